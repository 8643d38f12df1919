"""The budget of a step shared among its graphs, which are planned together before the first of them is compiled.

Each graph is compiled by itself, with what it may hold while the later ones run as one more limit. What that should be
is found by planning all of them as one problem (`cost_model/nested.py`): by predictions for the graphs to come, which
audits of code that is generated ahead of time have corrected, and by what those hold that are compiled. Some of the
budget is left free for what the graphs to come may take besides.

A graph may run in slices of the batch here as well. Slices are tried of one graph at a time, the one with the highest
peak first, as long as that helps.

Known gaps: a graph of which another variant than slices would be best (a smaller cut, contiguous volumes) is planned
without it here; it may take that variant when it is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from xconv_fx.compiler.candidates import FULL_BATCH, GLANCE, NEGLIGIBLE, Candidate, Variant, compared_variant, slowdown
from xconv_fx.cost_model.memory import Problem, peak
from xconv_fx.cost_model.nested import Nested, Part, Run, nest
from xconv_fx.cost_model.solver import Infeasible, solve
from xconv_fx.errors import BudgetExceededWarning, BudgetInfeasibleError, warn_user
from xconv_fx.options import Options
from xconv_fx.options.budget import Budget
from xconv_fx.planner.loss import KEPT, LOSS_COPIES
from xconv_fx.planner.microbatch import slice_step
from xconv_fx.planner.problem import PlanningProblem, corrected
from xconv_fx.planner.solve import limits, tradeoff_of
from xconv_fx.planner.surroundings import Surroundings
from xconv_fx.reproducible import effort
from xconv_fx.runtime.signature import Signature
from xconv_fx.units import format_size, sufficient_size

from .graphs import GraphRun, StepGraphs, Values

# The part of a budget that is left for what the predictions of graphs to come are short of.
MARGIN = 0.02
# Slicings of single graphs that are tried.
TRIES = 10
# Audits of all graphs, each of which may lead to another plan of them.
ROUNDS = 2


@dataclass(frozen=True)
class Together:
    """A plan of all graphs: their variants, the step as a problem, and the choices of all its items.

    `cost` is what `prefer` makes of noise and time, `peak` the most bytes alive; both predicted.
    """

    variants: tuple[Variant, ...]
    nested: Nested
    choice: tuple[int, ...]
    peak: int
    noise: float
    slowdown: float
    cost: tuple[float, float]

    def within(self, usable: int) -> tuple[object, ...]:
        """Smaller is better: what fits, by its cost, before what does not, by its peak."""
        return (0, *self.cost) if self.peak <= usable else (1, self.peak)


@dataclass
class Shares:
    """What the graphs of one step may take of its budget.

    In bytes: `resident` is there throughout the step besides what the graphs' inputs are, `held` what graphs that are
    compiled hold by their audits, and `corrections` what audits ahead of time found predictions to be short of; those
    are made before the first graph is compiled, unless it is `audited`. What an unknown loss keeps during the backward
    is allowed for, unless the budget has no room for it and steps are measured: `measured_losses`.
    """

    step: StepGraphs
    options: Options
    resident: int
    held: dict[int, int] = field(default_factory=dict)
    audited: bool = True
    measured_losses: bool = False
    corrections: dict[tuple[int, Variant], dict[str, int]] = field(default_factory=dict)
    _judged: dict[int, object] = field(default_factory=dict)
    _around: dict[tuple[int, int], Surroundings] = field(default_factory=dict)
    _problems: dict[tuple[int, Variant], PlanningProblem] = field(default_factory=dict)
    _sliced: dict[int, tuple[Variant, ...]] = field(default_factory=dict)

    # What the step's runs read and hand over, in numbers.

    @property
    def runs(self) -> tuple[GraphRun, ...]:
        """All runs before the first backward."""
        return self.step.runs * self.options.calls

    def count(self, graph: int) -> int:
        """How often a graph runs before the first backward."""
        return sum(run.graph == graph for run in self.runs)

    def _surrounding(self) -> tuple[list[int], list[int], int]:
        """Bytes alive beside each run's forward and backward that are no graph's, and what a loss takes besides."""
        constant = self.resident + self._inputs()
        runs, outputs = self.step.runs, self.step.outputs
        made = {key for run in runs for key in run.results}
        loss = sum(LOSS_COPIES * value.in_loss for value in outputs.values() if value.differentiated)
        wide = sum(value.in_loss - value.bytes * (key in made) for key, value in outputs.items())
        kept = wide + (0 if self.measured_losses else KEPT * sum(value.in_loss for value in outputs.values()))
        backward = [constant + kept * self.options.calls + size for size in self._gradients()]
        return [constant] * len(self.runs), backward, (loss + wide) * self.options.calls

    def _inputs(self) -> int:
        """Bytes of what the model was called with, and of what else runs read that no run before has made."""
        known = set(self.step.arguments)
        size = _bytes(self.step.arguments)
        for run in self.step.runs:
            new = {key: value for key, value in run.inputs.items() if key not in known}
            size += sum(value.bytes for value in new.values())
            known |= new.keys() | run.results.keys()
        return size * self.options.calls

    def _gradients(self) -> list[int]:
        """Bytes of gradients that are there before each run's backward and are none of the run's own.

        Those of the parameters of later runs, and those of results that wait for the backward of the run that made
        them, from the backward of the last run that read them on.
        """
        once = self.step.runs
        waiting = [0] * len(once)
        for place, run in enumerate(once):
            for key, value in run.results.items():
                if value.differentiated:
                    readers = [n for n, other in enumerate(once) if n > place and key in other.inputs]
                    last = len(once) if key in self.step.outputs or not readers else readers[-1]
                    for between in range(place + 1, last):
                        waiting[between] += value.bytes
        parameters: Values = {}
        found: list[int] = []
        for place in reversed(range(len(self.runs))):
            run = self.runs[place]
            found.insert(0, _bytes(parameters) + waiting[place % len(once)])
            parameters = {**parameters, **run.parameters}
        return found

    # The graphs as parts of one problem.

    def _part(self, graph: int, variant: Variant) -> Part:
        """A graph without what is alive in all of the step, and without a gradient of its results before it comes."""
        whole, planning = self._whole(graph), self._step_of(graph, variant)
        turn = planning.phases.index("loss")
        base = [size - whole.fixed_bytes for size in planning.problem.base]
        base[turn] -= whole.ends.between
        return Part(replace(planning.problem, base=tuple(base)), turn)

    def _step_of(self, graph: int, variant: Variant) -> PlanningProblem:
        planning = self._problem(graph, compared_variant(variant))
        assert planning is not None
        return slice_step(
            corrected(planning, self.corrections.get((graph, compared_variant(variant)), {})), variant.microbatches
        )

    def _whole(self, graph: int) -> PlanningProblem:
        planning = self._problem(graph, FULL_BATCH)
        assert planning is not None, "graphs without a backward are not among those of a step"
        return planning

    def _problem(self, graph: int, variant: Variant) -> PlanningProblem | None:
        if (graph, variant) not in self._problems:
            found = self.step.graphs[graph].problem(variant)
            if found is None:
                return None
            self._problems[graph, variant] = found
        return self._problems[graph, variant]

    def _compiled(self, graph: int) -> Part:
        """A graph of which all is known: what it holds."""
        return Part(Problem((0, self.held[graph], 0), ()), 1)

    def _nested(self, variants: Sequence[Variant]) -> Nested:
        forward, backward, loss = self._surrounding()
        parts = [
            self._compiled(graph) if graph in self.held else self._part(graph, variant)
            for graph, variant in enumerate(variants)
        ]
        runs = [Run(run.graph, before, after) for run, before, after in zip(self.runs, forward, backward, strict=True)]
        return nest(parts, runs, between=loss)

    # Planning all of them.

    @functools.cached_property
    def plain(self) -> int:
        """The predicted peak of the step with everything kept, the batch at once; in bytes."""
        nested = self._nested([FULL_BATCH] * len(self.step.graphs))
        return peak(nested.problem, [0] * len(nested.problem.items))[0]

    def plan(self, usable: int) -> Together:
        """The best plan within so many bytes; where there is none, the one of least peak."""
        target = usable - round(usable * MARGIN)
        variants = [FULL_BATCH] * len(self.step.graphs)
        best = self._best(variants, target)
        for tried, (graph, variant) in enumerate(self._others(best)):
            if tried == TRIES or (best.peak <= target and best.noise == 0 and best.slowdown <= NEGLIGIBLE):
                break
            variants = list(best.variants)
            variants[graph] = variant
            found = self._best(variants, target)
            if found.within(target) < best.within(target):
                best = found
        return best

    def _others(self, best: Together) -> Iterator[tuple[int, Variant]]:
        """Single graphs in slices: the graph of the highest peak first, all slices held or none."""
        tops = {g: best.nested.own_peak(g, best.choice) for g in range(len(self.step.graphs)) if g not in self.held}
        for graph in sorted(tops, key=lambda graph: -tops[graph]):
            for variant in self._slicings(graph):
                assert variant.microbatches is not None
                yield (
                    graph,
                    replace(variant, microbatches=replace(variant.microbatches, held=variant.microbatches.count)),
                )
                yield graph, variant

    def _slicings(self, graph: int) -> tuple[Variant, ...]:
        if graph not in self._sliced:
            self._sliced[graph] = tuple(self.step.graphs[graph].slicings())
        return self._sliced[graph]

    def _best(self, variants: Sequence[Variant], usable: int) -> Together:
        nested = self._nested(variants)
        seconds = sum(
            sum(self._whole(graph).seconds.values()) * self.count(graph) for graph in range(len(self.step.graphs))
        )
        price, kept = tradeoff_of(seconds, self.options), limits(self.options)
        try:
            choice = solve(nested.problem, usable, **effort(GLANCE), tradeoff=price, limits=kept).choice
        except Infeasible as error:
            choice = error.choice
        return self._together(variants, nested, choice)

    def _together(self, variants: Sequence[Variant], nested: Nested, choice: tuple[int, ...]) -> Together:
        plain = extra = noise = 0.0
        for graph, variant in enumerate(variants):
            whole = self._whole(graph)
            once = sum(whole.seconds.values()) * self.count(graph)
            plain += once
            if graph not in self.held:
                chosen = zip(nested.parts[graph].problem.items, nested.choice_of(graph, choice), strict=True)
                options = [item.options[index] for item, index in chosen]
                noise += sum(option.noise for option in options)
                planning, seconds = self._step_of(graph, variant), sum(option.time for option in options)
                extra += once * slowdown(planning, whole, variant.microbatches, seconds)
        slower = extra / max(plain, 1e-9)
        cost = Candidate(FULL_BATCH, noise, slower).cost(self.options.prefer)
        top = peak(nested.problem, choice)[0]
        return Together(tuple(variants), nested, choice, top, noise, slower, cost)

    # What each of them is told.

    @property
    def usable(self) -> int:
        """Bytes that the step may take."""
        assert self.options.mem_budget is not None
        return self.options.limit().usable

    def known(self) -> dict[Signature, int]:
        """What graphs hold that are compiled."""
        return {self.step.signatures[graph]: held for graph, held in self.held.items()}

    def surroundings(self, graph: int) -> Surroundings:
        """What this graph, which is compiled now, is to be planned beside, by what is known of those that are compiled.

        Raises `BudgetInfeasibleError` where no plan of all graphs is within the budget.
        """
        self.held.pop(graph, None)
        if (graph, len(self.held)) not in self._around:
            self._around[graph, len(self.held)] = self._share(graph, self.usable)
        return self._around[graph, len(self.held)]

    def _share(self, graph: int, usable: int) -> Surroundings:
        plan = self.plan if self.audited else self._audited
        together = plan(usable)
        if together.peak > usable:
            together = self._without_allowance(together, usable, plan)
        left = len(self.step.graphs) - len(self.held)
        spare = (usable - together.peak) * (left - 1) // left
        return self._beside(graph, together, spare)

    def _without_allowance(self, lowest: Together, usable: int, plan: Callable[[int], Together]) -> Together:
        """The plan where none has room for what a loss may keep: the first step tells whether this one does.

        Warns of it. Raises `BudgetInfeasibleError` where there is none either, or steps are not measured.
        """
        refused = self.refused(lowest)
        if self.measured_losses or self.options.verify == "off":
            raise refused
        self.measured_losses = True
        together = plan(usable)
        if together.peak > usable:
            self.measured_losses = False
            raise refused
        warn_user(
            f"xconv: mem_budget={format_size(refused.budget)} leaves no room for what a loss may keep during the "
            f"backward; the first step tells whether this one does. What fits any common loss: "
            f"mem_budget={sufficient_size(refused.smallest)!r}",
            BudgetExceededWarning,
        )
        return together

    def _audited(self, usable: int) -> Together:
        """The plan of all graphs, corrected by audits of the code that is generated for each, before anything runs.

        Where none is within the budget, the one of least memory, which is the same for every budget.
        """
        self.audited = True
        together = self.plan(usable)
        if together.peak <= usable:
            together = self._corrected(together, usable)
        if together.peak > usable:
            # What plans for this budget were short of is not what the plan of least memory is short of.
            self.corrections.clear()
            self._judged.clear()
            together = self._corrected(self.plan(0), 0)
        return together

    def _corrected(self, together: Together, usable: int) -> Together:
        for _ in range(ROUNDS):
            largest = max((self._correct(graph, together, usable) for graph in self._left()), default=0)
            if largest <= max(usable - together.peak, 0):
                break
            together = self.plan(usable)
        return together

    def _left(self) -> list[int]:
        return [graph for graph in range(len(self.step.graphs)) if graph not in self.held]

    def _correct(self, graph: int, together: Together, usable: int) -> int:
        """What an audit of the graph's code finds its prediction to be short of, in bytes, besides what is known.

        A plan of the graph that was audited is not short of more.
        """
        plan = together.variants[graph], together.nested.choice_of(graph, together.choice)
        if self._judged.get(graph) == plan:
            return 0
        self._judged[graph] = plan
        budget = Budget(bytes=self.options.smallest_for(max(usable, together.peak)))
        options = replace(self.options, mem_budget=budget, calls=self.count(graph))
        variant = together.variants[graph]
        known = self.corrections.setdefault((graph, compared_variant(variant)), {})
        found = self.step.graphs[graph].short_of(variant, self._beside(graph, together, 0), options, known)
        more = {phase: found.get(phase, 0) - known.get(phase, 0) for phase in ("forward", "backward")}
        known.update({phase: known.get(phase, 0) + size for phase, size in more.items() if size > 0})
        return max(more.values())

    def _beside(self, graph: int, together: Together, spare: int) -> Surroundings:
        nested, choice = together.nested, together.choice
        whole = self._whole(graph)
        forward: list[int] = []
        backward: list[int] = []
        outer, later = 0, self.count(graph) - 1
        for run in nested.runs:
            if run.part == graph:
                forward.append(run.forward + outer)
                # Its backward is planned beside the results of all its runs, those of later ones included.
                backward.append(run.backward + outer - later * whole.ends.results)
                later -= 1
            else:
                outer += nested.held(run.part, choice)
        throughout = max(forward)
        inside = nested.inside(graph, choice) - throughout - whole.ends.between
        return Surroundings(throughout - whole.fixed_bytes, inside, max(backward) - throughout, spare)

    def refused(self, lowest: Together) -> BudgetInfeasibleError:
        """The error that names a budget which all graphs meet."""
        assert self.options.mem_budget is not None
        budget = self.options.mem_budget.resolve(0)
        smallest = self.options.smallest_for(lowest.peak + round(lowest.peak * MARGIN))
        note = f"the {len(self.step.graphs)} graphs of a step are planned together; the smallest budget is one for all"
        return BudgetInfeasibleError(budget, smallest, self._consumers(lowest), (note,))

    def _consumers(self, lowest: Together) -> tuple[tuple[str, int], ...]:
        """The largest holders of memory at the peak of a plan of all graphs."""
        nested = lowest.nested
        alive, step = peak(nested.problem, lowest.choice)
        held = [
            sum(size for first, last, size in item.options[index].loads if first <= step <= last)
            for item, index in zip(nested.problem.items, lowest.choice, strict=True)
        ]
        names: list[str] = []
        for graph, part in enumerate(nested.parts):
            layers = [residual.layer for residual in self._whole(graph).residuals] if part.problem.items else []
            items = [item.name for item in part.problem.items]
            names += [f"graph {graph + 1}: {layer or item}" for layer, item in zip(layers, items, strict=True)]
        constant = self.resident + self._inputs()
        rest = alive - sum(held) - constant
        rows = [*zip(names, held, strict=True), ("parameters, buffers and inputs", constant)]
        where = nested.problem.labels[step] if nested.problem.labels else "the peak"
        rows.append((f"results, gradients and transients at {where}", rest))
        return tuple(sorted(rows, key=lambda row: -row[1])[:5])


def _bytes(found: Values) -> int:
    return sum(value.bytes for value in found.values())
