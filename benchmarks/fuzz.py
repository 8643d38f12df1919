"""`python benchmarks/fuzz.py --n 1000 --seed 0`: networks, steps and options at random, and what is wrong with any.

Cases that are done are kept in `--out`, so that a run can be stopped and taken up again; each that fails is shrunk and
written beside it as a program of its own. At the end stands how many cases went through what, and how many ended how.
Exits with 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz.cases import Case, draw_case
from fuzz.programs import Program
from fuzz.runner import Record, Worker, finished, interpreted, run_all
from fuzz.shrink import shrink

FINE = ("ok", "refused", "misfit", "inductor's", "torch's")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=Path("fuzz-results"), help="folder of records and failing programs")
    parser.add_argument("--only", type=int, nargs="*", help="run these cases again")
    parser.add_argument(
        "--shrink", action="store_true", help="shrink the cases that fail, which runs each up to 40 times"
    )
    parser.add_argument("--show", type=int, help="print the program of this case, and do no more")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if given.show is not None:
        print(Program(draw_case(given.seed, given.show)).standalone())
        return 0
    given.out.mkdir(exist_ok=True, parents=True)
    path = given.out / f"seed{given.seed}.jsonl"
    numbers = given.only or range(given.first, given.first + given.n)
    done = finished(path)
    left = [(n, draw_case(given.seed, n)) for n in numbers if given.only or n not in done]

    def keep(number: int, case: Case, record: Record) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"number": number, **record}) + "\n")
        print(number, record["kind"], record["detail"][:160].replace("\n", " "), f"({record['seconds']} s)", flush=True)

    run_all(left, given.jobs, keep)
    records = {n: r for n, r in finished(path).items() if n in numbers}
    wrong = {n: r for n, r in records.items() if r["kind"] not in FINE}
    for number, record in wrong.items():
        write_program(given.out, given.seed, number, record, given.shrink)
    print(table(records))
    return 1 if wrong else 0


def write_program(folder: Path, seed: int, number: int, record: Record, smaller: bool) -> None:
    """The failing case as a program, shrunk or as it was drawn."""
    path = folder / f"seed{seed}-{number}{'-small' if smaller else ''}.py"
    if path.exists():
        return
    case = draw_case(seed, number)
    if smaller:
        worker = Worker()
        case = shrink(
            case, lambda candidate: worker.run(candidate, number, interpreted(number))["kind"] == record["kind"]
        )
        worker.close()
    path.write_text(f'"""{record["kind"]}: {record["detail"][:400]}"""\n{Program(case).standalone()}')
    print(f"written: {path}", flush=True)


def table(records: dict[int, Record]) -> str:
    """How the cases ended, and what they went through, both by number."""
    kinds = Counter(record["kind"] for record in records.values())
    seen = Counter(what for record in records.values() for what in set(record["seen"]))
    taken = [record["cpu"] for record in records.values() if "cpu" in record]
    lines = [f"{len(records)} cases, {sum(taken) / max(1, len(taken)):.1f} s of processor time each", ""]
    lines += [f"  {count:5}  {kind}" for kind, count in kinds.most_common()]
    lines += ["", "of which went through", ""]
    lines += [f"  {count:5}  {what}" for what, count in seen.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
