"""The `torch.compile` backend: `torch.compile(model, backend="xconv", options={"mem_budget": "8GB"})`.

One call compiles one graph: parse the options, run the pipeline inside Inductor's partitioner, let Inductor generate
code for forward and backward, audit the peak of that code, and plan again, tighter, while it is over the budget.
Nothing runs before the audited peak fits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from xconv_fx.passes import pipeline

from . import hooks
from .audit import Audit, Peak
from .errors import BudgetInfeasibleError, surfaced_by_dynamo
from .log import log, publish
from .ops import lowering
from .options import Options
from .passes.graph import is_primal, is_tangent, nbytes
from .plan import Plan
from .report import as_text

# Plans tried before giving up on a budget that the audit keeps finding exceeded.
ATTEMPTS = 5


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
    lowering.install()
    return _Compilation(gm, example_inputs, chosen).run()


class _OverBudget(Exception):
    """Abandons a graph whose generated code exceeds the budget."""


class _Compilation:
    """The attempts to compile one graph within the budget."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        self.gm, self.example_inputs, self.options = gm, example_inputs, options
        self.job: pipeline.Job | None = None
        self.graph: tuple[fx.GraphModule, bool] | None = None
        self.peaks: dict[bool, int] = {}
        self.correction = 0
        self.attempt = 1
        self.abandoned = False

    def run(self) -> Callable[..., Any]:
        for self.attempt in range(1, ATTEMPTS + 1):
            self.abandoned = False
            self.peaks = {}
            try:
                compiled = self._compile(copy.deepcopy(self.gm) if self.options.mem_budget else self.gm)
            except Exception:
                if not self.abandoned:
                    raise
                continue
            self._report()
            return compiled
        raise self._gave_up()

    def _compile(self, gm: fx.GraphModule) -> Callable[..., Any]:
        key = f"{hooks.source_hash()} {self.options.fingerprint()} {self.correction}"
        settings = self.options.inductor_config()
        config = {**settings, "custom_partitioner_fn": hooks.Partitioner(self._partition, key)}
        kernels = hooks.Deferred()
        with (
            hooks.ahead_of_time_backward(),
            hooks.separate_kernels(),
            hooks.generated_code(self._audit),
            kernels.collect(),
        ):
            compiled = hooks.compile_graph(gm, self.example_inputs, config, self._entering)
        kernels.load(settings)
        return compiled

    def _partition(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **arguments: Any) -> Any:
        self.job = pipeline.run(
            pipeline.Job(gm, joint_inputs, arguments, self.options, correction=self.correction)
        )
        assert self.job.pair is not None
        return self.job.pair.forward, self.job.pair.backward

    def _entering(self, gm: fx.GraphModule, example_inputs: Sequence[Any], is_backward: bool) -> None:
        """Inductor is about to generate code for this graph."""
        self.graph = (gm, is_backward)
        self.inputs = list(example_inputs)

    def _audit(self, code: str) -> None:
        """Compute the peak of generated code; abandon the graph when it is over the budget."""
        if self.job is None or self.graph is None or self.job.plan is None or self.job.pair is None:
            return
        gm, is_backward = self.graph
        placeholders = gm.graph.find_nodes(op="placeholder")
        if is_backward:
            peak = self.audit.backward(code, self.inputs, [is_tangent(node) for node in placeholders])
        else:
            self.audit = Audit(self.job.outside)
            peak = self.audit.forward(code, self.inputs, self.job.pair.results)
        plan = self.job.plan
        self.peaks[is_backward] = peak.bytes
        self._log(peak, is_backward)
        budget = plan.budget
        if budget is not None and peak.bytes > budget - self.options.reserve:
            excess = peak.bytes - (plan.predicted_peak - self.correction)
            self.correction = max(self.correction + (budget // 100), excess)
            self.abandoned = True
            raise _OverBudget

    def _log(self, peak: Peak, is_backward: bool) -> None:
        log.debug(
            "audit of the %s, attempt %d: %d bytes at %s; alive: %s",
            "backward" if is_backward else "forward", self.attempt, peak.bytes, peak.at, peak.alive,
        )  # fmt: skip

    def _report(self) -> None:
        if self.job is None or self.job.plan is None:
            return
        plan = replace(self.job.plan, attempts=self.attempt, audited_peak=max(self.peaks.values(), default=None))
        publish(plan)
        if self.options.report is not None:
            self.options.report.write_text(plan.to_json())
        recent.append(plan)

    def _gave_up(self) -> BudgetInfeasibleError:
        assert self.job is not None and self.job.plan is not None
        plan = self.job.plan
        return BudgetInfeasibleError(plan.budget or 0, max(self.peaks.values()), ())


recent: list[Plan] = []

__all__ = ["as_text", "recent", "torch", "xconv"]
