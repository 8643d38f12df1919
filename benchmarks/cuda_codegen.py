"""CUDA code without a GPU, of every codec: `python benchmarks/cuda_codegen.py` prints a table and keeps its records.

For each case (a small network with everything held in one way, in float32 or under autocast in bfloat16) the code that
is generated for an H100: launches, calls besides the kernels, registers and local memory of the kernels compiled for
several GPUs, the audited peak over the predicted one, and what the kernels compute in Triton's interpreter, against the
graphs run eagerly. Of quantisation alone, the bytes that are read for each element that is encoded.

It needs g++ and triton (the extra `test`), and takes a minute a case on a core. Launches that run, speed, races and
what cuDNN does are not shown by any of this.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from harness import records
from harness.console import wide
from rich.table import Table

sys.path.insert(0, str(records.ROOT / "tests"))

from helpers.fake_cuda import FakeCuda, wrapper
from helpers.fake_cuda.cases import MATRIX
from helpers.fake_cuda.records import Case, Generated
from helpers.fake_cuda.units import Unit

SOURCES = ("benchmarks/cuda_codegen.py", "tests/helpers/fake_cuda")
ENCODED = [Unit("encode", (8, 32, 32, 32), order, bits, dtype)
           for order in ((0, 1, 2, 3), (0, 2, 3, 1)) for dtype in ("float32", "bfloat16")
           for bits in (8, 4, 2, 1)]  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One case. `launches` of forward and backward, `registers` the most of any kernel, `local` its bytes of spills and
    stack; `error` is the worst of any float result, `differing` the worst share of words; None where it was not run."""

    case: str
    launches: tuple[int, int]
    calls: dict[str, int]
    kernels: int
    registers: int
    local: int
    audited: int
    predicted: int
    error: float | None
    differing: float | None
    failure: str
    commit: str
    torch: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Read:
    """Bytes that are read for an element of a tensor that is encoded alone, and what the words need."""

    unit: str
    read: float
    written: float
    launches: int
    commit: str
    torch: str
    options: dict[str, Any]


def measure(cuda: FakeCuda, case: Case, capabilities: Sequence[int], interpreted: bool, made_by: Any) -> Record:
    try:
        generated = cuda.generate(case)
    except RuntimeError as error:
        return Record(case.label, (0, 0), {}, 0, 0, 0, 0, 0, None, None, str(error).splitlines()[-1], **made_by)
    cubins = [cubin for half in generated.halves for cubin in cuda.cubins(half.code, capabilities)]
    calls = sum((wrapper.fallbacks(half.code) for half in generated.halves), wrapper.Counter())
    forward, backward = (wrapper.launches(half.code).total() for half in generated.halves)
    error, differing, failure = _numerics(cuda, generated) if interpreted else (None, None, "")
    return Record(
        case.label,
        (forward, backward),
        {name: count for name, count in calls.items() if "convolution" not in name},
        len(cubins),
        max(cubin.registers for cubin in cubins),
        max(cubin.local for cubin in cubins),
        max(generated.audited.values()),
        max(generated.predicted.values()),
        error,
        differing,
        failure,
        **made_by,
    )


def _numerics(cuda: FakeCuda, generated: Generated) -> tuple[float | None, float | None, str]:
    try:
        values = cuda.interpret(generated).compared
    except RuntimeError as error:
        return None, None, str(error).splitlines()[-1]
    words = [value for value in values if value.dtype == "int32"]
    worst = max((value.differing / value.elements for value in words), default=0.0)
    return max(value.error for value in values), worst, ""


def read_by(cuda: FakeCuda, unit: Unit, made_by: Any) -> Read:
    launches = [launch for launch in cuda.unit(unit).launches if launch.read > 64]
    read, written = (sum(getattr(launch, name) for launch in launches) for name in ("read", "written"))
    layout = "channels-last" if unit.order[-1] == 1 else "contiguous"
    elements = prod(unit.size)
    return Read(
        f"{unit.bits} bits {unit.dtype} {layout}", read / elements, written / elements, len(launches), **made_by
    )


def measurements(wanted: str, capabilities: Sequence[int], interpreted: bool, folder: Path) -> Iterator[Record | Read]:
    made_by = records.made_by({"capabilities": list(capabilities), "interpreted": interpreted}, *SOURCES)
    with FakeCuda(folder) as cuda:
        if re.search(wanted, "encode"):
            for unit in ENCODED:
                yield read_by(cuda, unit, made_by)
        for case in MATRIX:
            if re.search(wanted, case.label):
                yield measure(cuda, case, capabilities, interpreted and case.net != "128", made_by)


def report(path: Path) -> Iterator[Table]:
    """The tables of what is known, the last record of each case."""
    cases = records.latest(path, "case")
    table = Table("case", "launches", "other calls", "kernels", "registers", "local B", "audited / predicted",
                  "worst error", "words apart")  # fmt: skip
    for row in cases.values():
        calls = ", ".join(f"{count} {name.removeprefix('xconv.')}" for name, count in row["calls"].items())
        ratio = f"{row['audited'] / row['predicted']:.3f}" if row["predicted"] else row["failure"]
        worst = (f"{row['error']:.0e}", f"{row['differing']:.0e}") if row["error"] is not None else (row["failure"], "")
        table.add_row(row["case"], "/".join(map(str, row["launches"])), calls, *(str(row[name]) for name in
                      ("kernels", "registers", "local")), ratio, *worst)  # fmt: skip
    yield table
    encoded = records.latest(path, "unit")
    table = Table("encoded alone", "bytes read an element", "written", "launches")
    for name, row in encoded.items():
        table.add_row(name, f"{row['read']:.2f}", f"{row['written']:.2f}", str(row["launches"]))
    yield table


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    records.add_arguments(parse, __file__)
    parse.add_argument("--cases", default="", help="a regular expression of the cases' names; 'encode' for the bytes")
    parse.add_argument("--capabilities", type=int, nargs="*", default=[80, 90, 100], help="GPUs to compile for")
    parse.add_argument("--interpret", action="store_true", help="run the kernels in Triton's interpreter")
    arguments = parse.parse_args()
    if not arguments.report:
        with tempfile.TemporaryDirectory() as folder:
            given = arguments.cases, arguments.capabilities, arguments.interpret, Path(folder)
            for record in measurements(*given):
                records.append(arguments.results, asdict(record))
    for table in report(arguments.results):
        wide().print(table)


if __name__ == "__main__":
    main()
