"""The `torch.compile` backend: `torch.compile(model, backend="xconv", options={"mem_budget": "8GB"})`.

One call compiles one graph: parse the options, run the pipeline inside Inductor's partitioner, let Inductor generate
code for forward and backward, audit the peak of that code, and plan again, tighter, while it is over the budget.
Kernels are compiled only for the plan that fits, and nothing runs before it does.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from xconv_fx.passes import pipeline

from . import hooks
from .audit import Audit, Peak
from .errors import BudgetInfeasibleError, XConvError, find_ours, surfaced_by_dynamo
from .log import log, publish
from .ops import lowering
from .options import Options, Probes
from .passes.graph import is_tangent, nbytes
from .passes.instance_norm import reshape_free_instance_norm
from .passes.problem import LOSS_COPIES
from .plan import Plan
from .schedule import LocalFusion, in_order
from .session import Session
from .sizes import Budget

# Plans tried before giving up on a budget that the audit keeps finding exceeded.
ATTEMPTS = 8


@surfaced_by_dynamo
def xconv(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph under a memory budget. `options` are those of `xconv_fx.options.Options`.

    Raises `OptionError` for a wrong option, `BudgetInfeasibleError` for a budget that no plan meets, and
    `UnsupportedTorchError` on a torch that the private hooks were not checked on: all before any step runs.
    """
    hooks.require_checked_torch()
    chosen = Options.parse(options, mode)
    if not hooks.needs_backward(example_inputs):
        chosen = replace(chosen, mem_budget=None)  # Nothing is held for a backward: plain Inductor.
    lowering.install()
    hooks.specialise(example_inputs)
    return Compilation(gm, example_inputs, chosen, Session.of(chosen)).run()


class _OverBudget(Exception):
    """Abandons a graph whose generated code exceeds the budget."""


class Compilation:
    """The attempts to compile one graph within the budget."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, session: Session) -> None:
        self.gm, self.example_inputs, self.options, self.session = gm, example_inputs, options, session
        self.outside = session.outside(gm)
        self.job: pipeline.Job | None = None
        self.audit = Audit(self.outside)
        self.half: tuple[fx.GraphModule, Sequence[Any], bool] | None = None
        self.peaks: dict[str, int] = {}
        self.corrections: dict[str, int] = {}
        self.abandoned = False
        # The audited peak of plain Inductor; the budget to report where another was planned for; and whether code
        # over the budget is abandoned.
        self.unbudgeted: int | None = None
        self.budget: int | None = None
        self.enforced = True

    def run(self) -> Callable[..., Any]:
        """The compiled graph of the first plan whose audited peak is within the budget."""
        if self.options.mem_budget is not None and (plain := self._plain()) is not None:
            return plain.run()
        infeasible = None
        for attempt in range(1, ATTEMPTS + 1):
            self.abandoned, self.job, self.peaks = False, None, {}
            try:
                compiled = self._compile(copy.deepcopy(self.gm))
            except Exception as error:
                if self.abandoned:
                    continue
                infeasible = find_ours(error)
                if not isinstance(infeasible, BudgetInfeasibleError):
                    raise
                break
            self._report(attempt)
            return compiled
        return self._least(None if self.corrections else infeasible, attempt)

    def _least(self, infeasible: XConvError | None, attempts: int) -> Callable[..., Any]:
        """The code of the plan of least predicted peak, which what the audit found of other plans does not rule out.

        `infeasible` names that peak, if it is known. Raises `BudgetInfeasibleError` when this code is over the budget
        as well, with its audited peak as the smallest budget: one that is known to work.
        """
        assert self.options.mem_budget is not None
        budget = self.options.mem_budget.resolve(0)
        error = infeasible if isinstance(infeasible, BudgetInfeasibleError) else self._predicted_least()
        least = self._with_budget(error.smallest)
        least.enforced = False
        least._compile(copy.deepcopy(self.gm), load=False)
        smallest = min(max(least.peaks.values()), self.unbudgeted or sys.maxsize) + self.options.reserve
        if smallest > budget:
            raise BudgetInfeasibleError(budget, smallest, error.consumers)
        compiled = least._compile(copy.deepcopy(self.gm))
        least.budget, least.unbudgeted = budget, self.unbudgeted
        least._report(attempts + 1)
        return compiled

    def _predicted_least(self) -> BudgetInfeasibleError:
        """What the planner says to a budget that nothing fits."""
        try:
            self._with_budget(1)._compile(copy.deepcopy(self.gm), load=False)
        except Exception as error:
            ours = find_ours(error)
            if isinstance(ours, BudgetInfeasibleError):
                return ours
            raise
        raise AssertionError("a plan for one byte")

    def _with_budget(self, size: int) -> Compilation:
        options = replace(self.options, mem_budget=Budget(bytes=size))
        return Compilation(self.gm, self.example_inputs, options, self.session)

    def _plain(self) -> Compilation | None:
        """Audit plain Inductor's code: what a budget in percent is a fraction of. Returned when it fits the budget."""
        assert self.options.mem_budget is not None
        plain = Compilation(
            self.gm, self.example_inputs, replace(self.options, mem_budget=None, probes=Probes()), self.session
        )
        plain._compile(copy.deepcopy(self.gm), load=False)
        self.unbudgeted = max(plain.peaks.values(), default=0)
        budget = self.options.mem_budget.resolve(self.unbudgeted)
        self.options = replace(self.options, mem_budget=Budget(bytes=budget))
        if self.unbudgeted > budget - self.options.reserve or self.options.probes != Probes():
            return None
        plain.budget, plain.unbudgeted = budget, self.unbudgeted
        return plain

    def _compile(self, gm: fx.GraphModule, load: bool = True) -> Callable[..., Any]:
        budgeted = not self.options.plain
        if budgeted:
            reshape_free_instance_norm(gm)
        settings = self.options.inductor_config()
        key = f"{hooks.source_hash()} {self.options.fingerprint()} {self.outside} {self.corrections}"
        config = {**settings, "custom_partitioner_fn": hooks.Partitioner(self._partition, key)}
        if budgeted:
            config.update(in_order(hooks.source_hash()))
        kernels = hooks.Deferred()
        with (
            hooks.ahead_of_time_backward(),
            hooks.separate_kernels(budgeted),
            hooks.fusion_rules(LocalFusion() if budgeted else None),
            hooks.generated_code(self._generated),
            kernels.collect(),
        ):
            compiled = hooks.compile_graph(gm, self.example_inputs, config, self._entering)
        if load:
            kernels.load(settings)
        return compiled

    def _partition(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **arguments: Any) -> Any:
        job = pipeline.Job(gm, joint_inputs, arguments, self.options, self.outside, dict(self.corrections))
        job.stream = self.session.stream
        self.job = pipeline.run(job)
        assert self.job.pair is not None
        return self.job.pair.forward, self.job.pair.backward

    def _entering(self, gm: fx.GraphModule, example_inputs: Sequence[Any], is_backward: bool) -> None:
        """Inductor is about to generate code for this half."""
        self.half = (gm, list(example_inputs), is_backward)

    def _generated(self, code: str) -> None:
        """Audit generated code; abandon the graph when it is over the budget."""
        if self.job is None or self.job.plan is None or self.half is None:
            return  # A graph without a backward: nothing was planned.
        for where, peak in self._replay(code, *self.half):
            self.peaks[where] = peak.bytes
            log.debug("audit: %s reaches %d bytes at %s; alive: %s", where, peak.bytes, peak.at, peak.alive)
        budget, worst = self.job.plan.budget, max(self.peaks.values())
        if self.enforced and budget is not None and worst > budget - self.options.reserve:
            self._tighten(budget - self.options.reserve)
            self.abandoned = True
            raise _OverBudget

    def _tighten(self, usable: int) -> None:
        """Correct the prediction of every phase by what the audit found; where it is over, by a hundredth at least."""
        assert self.job is not None
        for phase, audited in self.peaks.items():
            before = self.corrections.get(phase, 0)
            found = audited - (self.job.phase_peaks[phase] - before)
            self.corrections[phase] = max(found, before + usable // 100) if audited > usable else max(found, before)

    def _replay(
        self, code: str, gm: fx.GraphModule, inputs: Sequence[Any], is_backward: bool
    ) -> list[tuple[str, Peak]]:
        assert self.job is not None and self.job.pair is not None
        placeholders = gm.graph.find_nodes(op="placeholder")
        if is_backward:
            return [("backward", self.audit.backward(code, inputs, [is_tangent(node) for node in placeholders]))]
        self.audit = Audit(self.outside)
        tangents = [node for node in self.job.pair.backward.graph.find_nodes(op="placeholder") if is_tangent(node)]
        forward = self.audit.forward(code, inputs, self.job.pair.results)
        return [("forward", forward), ("loss", self.audit.loss(LOSS_COPIES * sum(map(nbytes, tangents))))]

    def _report(self, attempt: int) -> None:
        if self.job is None or self.job.plan is None:
            log.info("a graph without a backward: plain Inductor")
            return
        plan = replace(self.job.plan, attempts=attempt, audited_peak=max(self.peaks.values(), default=None))
        if self.unbudgeted is not None:
            plan = replace(plan, baseline_peak=self.unbudgeted)
        if self.budget is not None:
            plan = replace(plan, budget=self.budget)
        publish(plan)
        self.session.add(plan, self.gm)


def plan_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, session: Session) -> Plan | None:
    """The plan of one graph, without generating code; None for a graph without a backward."""
    compilation = _PlanOnly(gm, example_inputs, options, session)
    return compilation.plan()


class _PlanOnly(Compilation):
    def plan(self) -> Plan | None:
        try:
            self._compile(copy.deepcopy(self.gm))
        except Exception:
            if not self.abandoned:
                raise
        if self.job is None or self.job.plan is None:
            return None
        self.session.add(self.job.plan, self.gm)
        return self.job.plan

    def _partition(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **arguments: Any) -> Any:
        job = pipeline.Job(gm, joint_inputs, arguments, self.options, self.outside, dict(self.corrections))
        self.job = pipeline.run(job, disabled=("rewrite",))
        self.abandoned = True
        raise _OverBudget
