"""What the check of the first step costs: `python benchmarks/first_step.py` prints a table.

Two copies of a network are compiled under the same budget, one with `verify="off"` and one with the default. Steps are
interleaved: one that is not checked, one whose memory is measured (as the first after compiling is), and the one after
it, which only counts calls. "measured" and "after" are medians of the ratios to the unchecked step of the same round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from nets import MAIN_JOB
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from xconv_fx.runtime.first_step import StepCheck
from xconv_fx.step.front_door import _watch


def check_of(compiled: nn.Module) -> StepCheck:
    """The check of a compiled model, whose steps have run."""
    (session,) = _watch(compiled).sessions.values()
    return session.verifier.check


def timed(model: nn.Module, inputs: Tensor) -> float:
    """Seconds of one step."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    model(inputs).square().mean().backward()
    return time.perf_counter() - start


def ratios(name: str, budget: str, rounds: int) -> tuple[float, list[float], list[float]]:
    """Seconds of an unchecked step, and ratios to it of measured steps and of those after them."""
    net = MAIN_JOB[name]
    torch.manual_seed(0)
    model = net.build()
    inputs, _ = net.batch()
    found: dict[str, nn.Module] = {}
    for verify in ("off", "replan"):
        options = {"mem_budget": budget, "codecs": "exact", "verify": verify}
        found[verify] = torch.compile(copy.deepcopy(model), backend="xconv", options=options)  # type: ignore[assignment]
        for _ in range(3):
            timed(found[verify], inputs)
    check = check_of(found["replan"])
    unchecked, measured, after = [], [], []
    for _ in range(rounds):
        unchecked.append(timed(found["off"], inputs))
        check.again()
        measured.append(timed(found["replan"], inputs) / unchecked[-1])
        after.append(timed(found["replan"], inputs) / unchecked[-1])
    check.stop()
    return statistics.median(unchecked), measured, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="*", choices=list(MAIN_JOB), default=["resnet", "vgg"])
    parser.add_argument("--budget", default="70%")
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    table = Table(
        "network", "step", "measured", "after", title=f"budget {given.budget}, {torch.get_num_threads()} threads"
    )
    for name in given.net:
        seconds, measured, after = ratios(name, given.budget, given.rounds)
        spread = [f"{statistics.median(r):.3f} ({min(r):.2f} to {max(r):.2f})" for r in (measured, after)]
        table.add_row(name, f"{1e3 * seconds:.0f} ms", *spread)
    Console().print(table)


if __name__ == "__main__":
    main()
