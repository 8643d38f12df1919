"""What both examples share: train twice from one initialisation, exact and under a budget, and compare.

An example supplies a `Task` (network, batches, loss, score); this module compiles, trains, measures and prints. For
a seed, both runs start from the same weights and see the same batches in the same order for the same number of steps,
so that all they differ in is what was held between forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from xconv_fx.errors import OptionError
from xconv_fx.measure import Peak, training_peak
from xconv_fx.options.budget import Budget
from xconv_fx.units import format_size

# The first steps warm caches and allocator up; their times say nothing about the rest.
UNTIMED_STEPS = 3

BUDGET_HELP = "of physical peak: a size such as 40MB, or a share of the exact run's peak such as the default, 60%%"


class Task(Protocol):
    """One thing to learn, and how well it was learnt."""

    title: str
    learning_rate: float

    def build(self) -> nn.Module:
        """The network, drawn from the current random state."""
        ...

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one training step."""
        ...

    def loss(self, output: Tensor, target: Tensor) -> Tensor: ...

    def score(self, model: nn.Module) -> dict[str, float]:
        """By name, on data not trained on; higher is better, and the first is what runs are compared by."""
        ...


@dataclass(frozen=True)
class Run:
    """What one training run came to. `seconds` is the median time of a step, optimiser included."""

    peak: Peak
    seconds: float
    final_loss: float
    score: dict[str, float]

    @property
    def headline(self) -> float:
        return next(iter(self.score.values()))


def train(task: Task, seed: int, steps: int, options: dict[str, Any] | None, label: str) -> Run:
    """Trains from scratch with Adam and a cosine schedule: with plain Inductor, or with xconv when it has `options`.

    The peak is that of one forward and backward on a fresh batch at the end: parameters, buffers, inputs, and
    everything that is allocated, gradients included. Targets and the optimiser's state are the same in every run and
    not counted.
    """
    torch.compiler.reset()
    torch.manual_seed(seed)
    model = task.build()
    backend: dict[str, Any] = {} if options is None else {"backend": "xconv", "options": options}
    compiled = cast(nn.Module, torch.compile(model, **backend))
    optimiser = torch.optim.Adam(model.parameters(), lr=task.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    times, losses = [], []
    for _ in track(range(steps), description=f"{label}, seed {seed}", transient=True):
        inputs, target = task.batch(generator)
        start = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        loss = task.loss(compiled(inputs), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
        schedule.step()
    inputs, target = task.batch(generator)
    peak = training_peak(compiled, inputs, lambda output: task.loss(output, target))
    model.eval()
    with torch.no_grad():
        score = task.score(model)
    return Run(peak, statistics.median(times[UNTIMED_STEPS:] or times), statistics.mean(losses[-10:]), score)


def compare(task: Task, seed: int, steps: int, budget: Budget) -> tuple[Run, Run, int]:
    """An exact run, a budgeted one from the same initialisation, and the budget in bytes.

    A budget in per cent is one of the exact run's measured peak.
    """
    exact = train(task, seed, steps, None, "exact")
    limit = budget.resolve(exact.peak.bytes)
    return exact, train(task, seed, steps, {"mem_budget": limit}, "budgeted"), limit


def comparison_table(task: Task, exact: Sequence[Run], budgeted: Sequence[Run], limits: Sequence[int]) -> Table:
    """Means over seeds, with the standard deviation where there are several."""
    table = Table(title=task.title, title_justify="left")
    table.add_column("")
    for heading in ("exact (Inductor)", "budgeted (xconv)", "ratio"):
        table.add_column(heading, justify="right")

    def add(label: str, value: Callable[[Run], float], show: Callable[[float], str]) -> None:
        first, second = ([value(run) for run in runs] for runs in (exact, budgeted))
        ratio = statistics.mean(second) / statistics.mean(first)
        table.add_row(label, mean_and_spread(first, show), mean_and_spread(second, show), f"{ratio:.2f}")

    add("measured peak", lambda run: run.peak.bytes, format_size)
    table.add_row("budget", "none", mean_and_spread(limits, format_size), "")
    add("step (median)", lambda run: run.seconds, lambda seconds: f"{1e3 * seconds:.0f} ms")
    add("final training loss", lambda run: run.final_loss, "{:.4f}".format)
    for name in exact[0].score:
        add(name, part_of_score(name), "{:.4f}".format)
    return table


def part_of_score(name: str) -> Callable[[Run], float]:
    return lambda run: run.score[name]


def mean_and_spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    mean = show(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {show(statistics.stdev(values))}"


def verdicts(exact: Sequence[Run], budgeted: Sequence[Run], limits: Sequence[int]) -> list[str]:
    """What the table shows, in sentences: did every run fit, and is the score within the spread of exact training?"""
    fitting = sum(run.peak.bytes <= limit for run, limit in zip(budgeted, limits, strict=True))
    lines = [f"Measured peak within the budget: {fitting} of {len(budgeted)} runs."]
    name = next(iter(exact[0].score))
    if len(exact) < 2:
        return [*lines, "One seed says nothing about the spread of the score: try --seeds 3."]
    lowest, highest = min(run.headline for run in exact), max(run.headline for run in exact)
    mean = statistics.mean(run.headline for run in budgeted)
    where = "below" if mean < lowest else "above" if mean > highest else "within"
    spread = f"{lowest:.4f} to {highest:.4f} over {len(exact)} seeds"
    return [*lines, f"Mean {name} under the budget, {mean:.4f}, is {where} the range of exact training ({spread})."]


def budget_argument(text: str) -> Budget:
    try:
        return Budget.parse(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(error.hint) from error


def main(task: Task, *, steps: int, quick_steps: int, arguments: Sequence[str] | None = None) -> None:
    """The command line of an example; `steps` is its default."""
    parser = argparse.ArgumentParser(description=task.title)
    parser.add_argument("--steps", type=int, help=f"training steps of every run (default {steps})")
    parser.add_argument("--budget", type=budget_argument, default="60%", help=BUDGET_HELP)
    parser.add_argument("--seeds", type=int, default=1, help="repeat over so many seeds and print the spread")
    parser.add_argument("--quick", action="store_true", help=f"only {quick_steps} steps: shows the peak, not the score")
    chosen = parser.parse_args(arguments)
    steps = chosen.steps or (quick_steps if chosen.quick else steps)
    if min(steps, chosen.seeds) < 1:
        parser.error("--steps and --seeds must be at least 1")
    console = Console()
    parameters = sum(parameter.numel() for parameter in task.build().parameters())
    console.print(f"{parameters:,} parameters, {steps} steps, seeds 0 to {chosen.seeds - 1}")
    results = [compare(task, seed, steps, chosen.budget) for seed in range(chosen.seeds)]
    exact, budgeted, limits = (list(column) for column in zip(*results, strict=True))
    console.print(comparison_table(task, exact, budgeted, limits))
    for line in verdicts(exact, budgeted, limits):
        console.print(line)
