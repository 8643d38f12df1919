"""`frontier`: what every budget costs, from the lowest that has a plan to none, on one trace of the model.

A step's planning problem does not depend on its budget, so each variant of a graph is traced once, and its problem,
built once, is solved for many budgets. The graphs of a model that Dynamo breaks into several are planned together: what
is alive beside one of them only shifts its problems.

A plan for a smaller budget is a plan for a larger one as well. The solver is stopped after a while and may miss it, so
a point that costs more than the one below it takes that one's plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from xconv_fx.compiler.candidates import FULL_BATCH, Candidate
from xconv_fx.compiler.capture import CaptureRequest
from xconv_fx.compiler.predicted import PlannedGraph, plan_graph
from xconv_fx.device.scenario import Scenario
from xconv_fx.errors import BudgetInfeasibleError, OptionError
from xconv_fx.options import Options
from xconv_fx.options.budget import Budget
from xconv_fx.plan import Plan, Totals
from xconv_fx.planner.microbatch import slice_step
from xconv_fx.progress import announce
from xconv_fx.runtime.session import Session
from xconv_fx.stack_room import with_stack_room
from xconv_fx.step.explain import FakeTrainingStep
from xconv_fx.step.found_graph import FoundGraph
from xconv_fx.step.together import Finder, placed, share
from xconv_fx.units import format_size

from .memory import Memory, memory_of

POINTS = 10
# Attempts at the lowest budget of a graph; the first finds it, if the solver is not stopped too early.
CLIMBS = 3


@dataclass(frozen=True)
class Point:
    """The plans of a model's graphs under one `budget` in bytes (None: without).

    `seconds` is the predicted time of a plain step, `memory` what is alive over the step of each graph.
    """

    budget: int | None
    plans: tuple[Plan, ...]
    seconds: float
    memory: tuple[Memory, ...]

    @property
    def totals(self) -> Totals:
        """The graphs' plans as one."""
        return Totals.of(self.plans)

    @property
    def peak(self) -> int:
        """Predicted peak of the step in bytes."""
        return self.totals.peak

    @property
    def noise(self) -> float:
        """Predicted variance that is added to the gradients, relative to their energy."""
        return self.totals.noise

    @property
    def time(self) -> float:
        """Predicted extra seconds of a step."""
        return self.totals.time

    @property
    def slowdown(self) -> float:
        """The extra time as a fraction of the plain step."""
        return self.time / self.seconds if self.seconds else 0.0

    @property
    def slices(self) -> int:
        """Slices of the batch, of the graph that is cut most."""
        return self.totals.slices

    def codecs(self) -> dict[str, int]:
        """Bytes of the residuals that each codec holds something in place of, largest first."""
        sizes: dict[str, int] = {}
        for plan in self.plans:
            for choice in plan.choices:
                sizes[choice.codec] = sizes.get(choice.codec, 0) + plan.slices * choice.bytes_before
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Frontier:
    """Points of ascending budget, the last without one. `left_out` says of which budgets there is none, and why.

    `wanted` is the budget in bytes that was asked for, if one was.
    """

    points: tuple[Point, ...]
    left_out: tuple[str, ...] = ()
    wanted: int | None = None

    @property
    def selected(self) -> int:
        """The index of the point that was asked for, or of one in the middle."""
        budgets = [point.budget for point in self.points[:-1]]
        return budgets.index(self.wanted) if self.wanted in budgets else len(budgets) // 2

    @property
    def missed(self) -> bool:
        """Whether the budget that was asked for has no plan."""
        return self.wanted is not None and all(point.budget != self.wanted for point in self.points)


@with_stack_room
def frontier(
    model: nn.Module,
    *inputs: Any,
    points: int = POINTS,
    mem_budget: str | int | None = None,
    loss: str | Callable[..., Tensor] = "mean",
    targets: Sequence[Any] = (),
    device: str | None = None,
    gpu: str | None = None,
    amp: str | None = None,
    channels_last: bool = False,
    optimizer: str | None = None,
    **options: Any,
) -> Frontier:
    """The frontier of a model in some `points`, one of which is for `mem_budget` if that is given.

    The other arguments, and what is raised, are those of `explain`.
    """
    if points < 2:
        raise OptionError("points", points, "write 2 or more: the lowest budget, and none")
    wanted = None if mem_budget is None else Budget.parse(mem_budget)
    chosen = Options.parse(options)
    trace = FakeTrainingStep(model, inputs, Scenario.parse(device, gpu, amp, channels_last, optimizer), loss, targets)
    return _Sweep(trace, chosen, points, wanted).frontier()


@dataclass
class _Series:
    """The graphs' plans under one budget, as far as they have any; `missed` says why there is none."""

    options: Options
    session: Session
    plans: list[Plan] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    missed: str = ""


class _Sweep:
    """Plans the graphs of a trace for a range of budgets."""

    def __init__(self, trace: FakeTrainingStep, options: Options, points: int, wanted: Budget | None) -> None:
        self.trace, self.options, self.points, self.wanted = trace, options, points, wanted
        self.plain = _Series(options, trace.session(options))
        self.seconds = 0.0

    def frontier(self) -> Frontier:
        """What is found."""
        finder = Finder(self.plain.session, self.options, self.trace.scenario.notes, apart=True)

        def take(gm: fx.GraphModule, example_inputs: list[Any]) -> FoundGraph:
            announce(f"tracing graph {finder.count + 1}")
            return finder(gm, example_inputs)

        with self.trace.tracing():
            self.step = self.trace.graphs(take)
            self._plan(self.plain)
            lowest, top = self._ends()
            series = self._series(lowest, top)
            for number, one in enumerate(series, start=1):
                announce(f"planning for budget {number} of {len(series)}")
                self._plan(one)
        return self._frontier(series, top)

    def _ends(self) -> tuple[int, int]:
        """The lowest budget that has a plan, as far as known, and the one that changes nothing."""
        plain, shares = 0, self._of(1).session.shares
        for graph in range(len(self.step.graphs)):
            with self._request(self.plain, graph) as request:
                whole = request.problem(FULL_BATCH)
            assert whole is not None, "graphs without a backward are not among those of a step"
            plain = max(plain, whole.baseline_peak()) if shares is None else shares.plain
            self.seconds += sum(whole.seconds.values()) * sum(run.graph == graph for run in self.step.runs)
        announce("looking for the lowest budget")
        lowest = 1
        for _ in range(CLIMBS):
            try:
                self._plan_all(self._of(lowest))
            except BudgetInfeasibleError as error:
                lowest = error.smallest
            except OptionError:
                # Some plan is within the budget, but none within the limits of noise and time.
                break
            else:
                break
        return lowest, self.options.smallest_for(plain)

    def _frontier(self, all_series: list[_Series], top: int) -> Frontier:
        found: list[Point] = []
        for series in all_series:
            if series.missed or series.options.mem_budget is None:
                continue
            point = self._point(series)
            if found and self._cost(found[-1]) < self._cost(point):
                point = _under(found[-1], point)
            found.append(point)
        missed = tuple(series.missed for series in all_series if series.missed)
        wanted = None if self.wanted is None else self.wanted.resolve(top)
        return Frontier((*found, self._point(self.plain)), missed, wanted)

    def _point(self, series: _Series) -> Point:
        budget = None if series.options.mem_budget is None else series.options.mem_budget.bytes
        return Point(budget, tuple(series.plans), self.seconds, tuple(series.memory))

    def _cost(self, point: Point) -> tuple[float, float]:
        return Candidate(FULL_BATCH, point.noise, point.slowdown).cost(self.options.prefer)

    def _of(self, budget: int) -> _Series:
        options = replace(self.options, mem_budget=Budget(bytes=budget))
        series = _Series(options, self.trace.session(options))
        if len(self.step.runs) > 1 and not options.codecs.preset:
            share(series.session, self.step, options)
        return series

    def _series(self, lowest: int, top: int) -> list[_Series]:
        """Budgets in equal ratios from the lowest to the top, and the one that is wanted."""
        steps = max(self.points - 2, 1)
        budgets = {round(lowest * (top / lowest) ** (step / steps)) for step in range(self.points - 1)}
        if self.wanted is not None:
            budgets.add(self.wanted.resolve(top))
        return [self._of(budget) for budget in sorted(budgets)]

    @contextlib.contextmanager
    def _request(self, series: _Series, number: int) -> Iterator[CaptureRequest]:
        graph: FoundGraph = self.step.graphs[number]
        with graph.compiling.again():
            yield placed(graph, series.session, series.options)

    def _plan(self, series: _Series) -> None:
        try:
            self._plan_all(series)
        except BudgetInfeasibleError as error:
            series.missed = f"{format_size(error.budget)} cannot be met"
        except OptionError as error:
            series.missed = str(error)

    def _plan_all(self, series: _Series) -> None:
        for number in range(len(self.step.graphs)):
            with self._request(series, number) as request:
                found = plan_graph(request)
                if found is not None:
                    series.plans.append(found.plan)
                    series.memory.append(_memory(found))


def _memory(found: PlannedGraph) -> Memory:
    """Memory over the whole step of what was planned."""
    planning, microbatches = found.planned.planning, found.variant.microbatches
    return memory_of(planning if microbatches is None else slice_step(planning, microbatches), found.plan)


def _under(point: Point, other: Point) -> Point:
    """The plans of a point under the larger budget of another."""
    plans = tuple(replace(plan, budget=other.budget) for plan in point.plans)
    return replace(point, budget=other.budget, plans=plans)
