"""What follows when a training step takes more than its budget: plan again, or say so (the option `verify`).

The budget is of a whole step, and what a step does besides running the compiled graphs is known when it has run once:
its loss, what code between graphs holds, how often the model is called. What was not foreseen is then planned for: as
so many calls where that is the cause, else as a reserve of so many bytes. Dynamo compiles the frames anew when they are
next called, in the order of the step, with the plans that this leads to; backwards that are outstanding have their own
code. Where no plan meets the budget, the step runs as before, and a warning says what it takes and what would work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from xconv_fx.errors import BudgetExceededWarning, BudgetInfeasibleError, XConvError, warn_user
from xconv_fx.options import Options
from xconv_fx.plan.log import log
from xconv_fx.units import format_size, sufficient_size

from .first_step import CheckedGraph, StepCheck

if TYPE_CHECKING:
    from .session import GraphKey, GraphRecord, Session

# How often the graphs of a session are planned again, in all.
REPLANS = 3
# By what part another plan may need more for what a step does besides than was measured with this one.
UNSURE = 0.02


@dataclass(frozen=True)
class Found:
    """What measured steps were found to need besides what the options say: bytes, and calls of graphs."""

    reserve: int = 0
    calls: Mapping[GraphKey, int] = field(default_factory=dict)


class Verifier:
    """Judges the measured steps of one session. `left` is how often its graphs may still be planned again."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.check = StepCheck(self)
        self.found = self.before = Found()
        self.left = REPLANS if session.options.verify == "replan" else 0
        self.said = False

    @property
    def module(self) -> nn.Module | None:
        return self.session.module

    def options(self, options: Options, key: GraphKey | None = None) -> Options:
        """The options by which a graph, or one that is not known yet, is to be planned, with what was found."""
        calls = options.calls if key is None else max(options.calls, self.found.calls.get(key, 1))
        return replace(options, reserve=options.reserve + self.found.reserve, calls=calls)

    def checked(self, function: Callable[..., Any], record: GraphRecord) -> CheckedGraph:
        """The compiled function of a graph, whose next step is measured."""
        self.check.again()
        return CheckedGraph(function, self.check, record)

    def measured(self, graphs: Sequence[CheckedGraph], peak: int) -> bool:
        """A step of these graphs took `peak` bytes so far; returns whether that settles it."""
        for graph in graphs:
            graph.record = self.session.ran(graph.record, graph.most, peak)
        budget = self.session.budget
        if budget is None or peak <= budget:
            for graph in graphs:
                graph.planned = max(graph.planned, graph.most)
            return False
        over = peak - budget
        took = f"a training step took {format_size(peak)}, {format_size(over)} over the budget of {format_size(budget)}"
        more = [graph for graph in graphs if graph.most > graph.planned]
        if more:
            self._more_calls(more, took)
        elif self.left:
            # What the audit does not see: plans must take less by what the step is over, even if they are not full.
            unseen = peak - max(graph.record.plan.peak for graph in graphs) - self.session.options.reserve
            self._again(replace(self.found, reserve=max(unseen, self.found.reserve + over)), took)
        elif not self.said:
            self.said = True
            needed = sufficient_size(self.session.options.reserve + self.found.reserve + over)
            _warn(f"{took}. What would work: the option reserve={needed!r}, or a larger mem_budget")
        return True

    def called(self, graphs: Sequence[CheckedGraph]) -> None:
        """In a step that is not measured, these graphs ran more often before the backward than planned."""
        self._more_calls(graphs, "a training step may exceed its budget")

    def _more_calls(self, graphs: Sequence[CheckedGraph], why: str) -> None:
        planned, most = max((graph.planned, graph.most) for graph in graphs)
        for graph in graphs:
            graph.planned = graph.most
        again = "; planned again for that now" if self.left else ""
        _warn(
            f"{why}: a graph was planned for {planned} call{'s' if planned > 1 else ''} a step, and ran {most} times "
            f"before the backward. What would work: the option calls={most}{again}"
        )
        if self.left:
            calls = {graph.record.graph.key: graph.most for graph in graphs}
            self._again(replace(self.found, calls={**self.found.calls, **calls}), why)

    def _again(self, found: Found, why: str) -> None:
        """Plan all graphs again, with what was found, from the next step on."""
        self.left -= 1
        self.before, self.found = self.found, found
        calls = max(found.calls.values(), default=1)
        log.warning(
            "%s; planned again with reserve=%d%s", why, self.session.options.reserve + found.reserve,
            f" and calls={calls}" if calls > 1 else "",
        )  # fmt: skip
        self.session.compile_anew()

    def refused(self, error: XConvError) -> bool:
        """No plan meets the budget with what was found: returns whether that may be left out, after a warning."""
        if self.found == self.before:
            return False
        self.found, self.left, self.said = self.before, 0, True
        taken = self.session.measured_peak
        took = "" if taken is None else f"a training step takes {format_size(taken)}, and "
        if isinstance(error, BudgetInfeasibleError):
            _warn(
                f"{took}no plan keeps it within mem_budget={format_size(error.budget)}. What would work: "
                f"mem_budget={sufficient_size(round(error.smallest * (1 + UNSURE)))!r}, or a smaller batch or input"
            )
        else:
            _warn(f"{took}no plan keeps it within the budget: {error}")
        return True


def _warn(text: str) -> None:
    warn_user(f"xconv: {text}", BudgetExceededWarning)
