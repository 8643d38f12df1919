"""Is the mean gradient the exact one? 64 draws of every network of the main job under the tightest budget there is.

In float64, so that rounding does not blur the comparison with plain autograd; the budget is the smallest feasible one,
where every large residual is held approximately. For every parameter the error of the mean
of the draws is projected on random directions and divided by its own standard error: under no bias each of these is a
t value with 63 degrees of freedom. The table shows the largest of them next to what chance alone exceeds once in
twenty tables, and the share of single coordinates whose 95% confidence interval holds the exact value. Parameters whose
gradient does not vary between draws must agree to 1e-9 of it, or of the largest gradient where it is all but zero.

The smallest budget approximates few tensors where one transient sets the peak. `--probes N` also holds the input of
every layer as N probes a sample, so that every weight gradient is noisy.

    python benchmarks/unbiased.py --net vgg
    python benchmarks/unbiased.py --net vgg --probes 64
"""

from __future__ import annotations

import argparse
import sys

import torch
from harness.bias import Verdict, errors_of, verdict
from harness.lowest import at_lowest_budget
from harness.subject import Subject
from harness.worker import alone
from nets import MAIN_JOB
from rich.console import Console
from rich.table import Table


def lowest(name: str, probes: int | None) -> Subject:
    """The network compiled at the smallest budget that the backend accepts."""
    more = {} if probes is None else {"probes": probes}

    def attempt(budget: int) -> Subject:
        torch._dynamo.reset()
        subject = Subject(MAIN_JOB[name], torch.float64)
        subject.compile({"mem_budget": budget, **more})
        subject.step()
        return subject

    return at_lowest_budget(attempt)[1]


def judge(name: str, draws: int, probes: int | None) -> Verdict:
    """Run one network; in a process of its own."""
    exact = Subject(MAIN_JOB[name], torch.float64).gradients()
    subject = lowest(name, probes)
    torch.manual_seed(1)
    errors = {parameter: errors_of(gradient) for parameter, gradient in exact.items()}
    for _ in range(draws):
        for parameter, gradient in subject.gradients().items():
            errors[parameter].add(gradient)
    return verdict([*errors.values()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", choices=sorted(MAIN_JOB), help="a network (repeatable; default: all)")
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--probes", type=int, help="hold the input of every layer as so many probes a sample")
    chosen = parser.parse_args(arguments)
    how = "" if chosen.probes is None else f", {chosen.probes} probes a layer"
    table = Table(title=f"{chosen.draws} draws at the smallest feasible budget, float64{how}")
    for column in ("network", "parameters", "with noise", "noise of a draw", "largest |t|", "limit", "within 95% CI"):
        table.add_column(column, justify="left" if column == "network" else "right")
    good = True
    for name in chosen.net or list(MAIN_JOB):
        row = alone(judge, name, chosen.draws, chosen.probes)
        good &= row.unbiased
        table.add_row(
            name, str(row.tensors), str(row.noisy), f"{row.noise:.1e}", f"{row.largest:.2f}", f"{row.limit:.2f}",
            f"{row.coverage:.1%}",
        )  # fmt: skip
    Console(width=110).print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
