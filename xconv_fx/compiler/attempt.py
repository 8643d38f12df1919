"""Compile one graph for one way of running it: plan, generate, audit, and plan again, tighter, while over the budget.

The way is all of the batch at once, or slices of it (`runtime/microbatch_step.py`). Kernels are compiled only for a
plan whose generated code fits, and nothing runs before one does.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from xconv_fx import hooks
from xconv_fx.device import rates
from xconv_fx.errors import BudgetInfeasibleError, find_ours
from xconv_fx.hooks.scheduler import LocalFusion, in_order
from xconv_fx.ops import conv3d
from xconv_fx.options import Options, Probes
from xconv_fx.options.budget import Budget
from xconv_fx.options.codecs import CodecSet
from xconv_fx.passes.batch_separability import NOTHING
from xconv_fx.passes.channels_last_3d import volumes_channels_last
from xconv_fx.passes.graph import MATMULS, is_primal, is_tangent, nbytes, output_node
from xconv_fx.passes.instance_norm import reshape_free_instance_norm
from xconv_fx.passes.replicate_padding import concatenated_replicate_padding
from xconv_fx.passes.slice_graph import Drawn, slice_graph
from xconv_fx.passes.unpooling import scatter_unpooling
from xconv_fx.plan import Plan
from xconv_fx.plan.log import log, publish
from xconv_fx.planner.peak_scenarios import Calls, scenarios
from xconv_fx.planner.problem import Posed
from xconv_fx.planner.slicing import Batch
from xconv_fx.planner.solve import ANY, Bounds
from xconv_fx.planner.surroundings import Surroundings
from xconv_fx.runtime.microbatch_step import Result, Sliced, slice_inputs
from xconv_fx.runtime.session import TOGETHER, Graph, GraphRecord, Session

from . import pipeline
from .audit import Audit, Peak
from .candidates import AT_ONCE, Route
from .fingerprint import source_hash

# A batch that was not looked for.
_UNSEEN = Batch(0, (), 0, 0, 0)
# Operators that run as calls, between which no kernels are fused.
CALLED = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default, *MATMULS, *conv3d.OPERATORS)


class _Abandoned(Exception):
    """Ends a compilation that has given what it was run for, or whose code exceeds the budget."""


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own on the same tensors, to be compiled more than once.

    Dynamo makes what an optimiser updates attributes of its graph: code that was compiled for copies of these tensors
    would leave the user's as they are.
    """
    copy_of_it = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    copy_of_it.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):  # The body of a checkpoint or another operator that takes a graph.
            setattr(copy_of_it, name, copied(child))
    return copy_of_it


@dataclass
class Traced:
    """The graph that Dynamo traced, and what it is compiled with.

    `known` is what is known of it, and `surroundings` what it is planned beside, where its session is not asked.
    `batch` are the inputs that hold samples, if any do, which the graph tells only while Dynamo compiles it.
    """

    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    options: Options
    session: Session
    notes: tuple[str, ...] = ()
    known: Graph | None = None
    surroundings: Surroundings | None = None
    batch: Batch | None = _UNSEEN

    def __post_init__(self) -> None:
        if self.batch is _UNSEEN:
            self.batch = Batch.of(self.gm, self.example_inputs)

    @functools.cached_property
    def graph(self) -> Graph:
        """What its session knows it by."""
        return self.known or self.session.graph(self.gm)

    @property
    def calls(self) -> Calls:
        """How often it runs in a step. Gradients of graphs that are planned together are in their surroundings."""
        graph = self.graph
        gradients = 0 if graph.key.frame == TOGETHER else graph.parameters
        return Calls(self.options.calls, graph.given, gradients, chain=graph.given < graph.inputs)

    @functools.cached_property
    def around(self) -> Surroundings:
        """What is alive in the step besides it. Raises `BudgetInfeasibleError` where the step cannot be planned."""
        return self.surroundings or self.session.surroundings(self.graph)

    def within(self, budget: int) -> Traced:
        """The same under a budget in bytes."""
        return replace(self, options=replace(self.options, mem_budget=Budget(bytes=budget)))

    def plain(self) -> Traced:
        """The same as Inductor compiles it by itself."""
        return replace(
            self, options=replace(self.options, mem_budget=None, probes=Probes(), codecs=CodecSet(), slices=None)
        )


@dataclass
class Compilation:
    """The attempts to compile one graph in one way.

    `corrections` are what audits found the prediction of a phase to be
    short of, `peaks` the audited peaks of the last attempt; in bytes. Code over the budget is abandoned while
    `enforced`.
    """

    traced: Traced
    route: Route = AT_ONCE
    corrections: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    enforced: bool = True
    bounds: Bounds = ANY

    def __post_init__(self) -> None:
        self.around = self.traced.around
        self.job: pipeline.Job | None = None
        self.audit = Audit(self.around.throughout)
        self.batch, self.drawn = self.traced.batch, Drawn()
        self.half: tuple[fx.GraphModule, Sequence[Any], bool] | None = None
        self.kernels = hooks.Deferred()
        self.compiled: Callable[..., Any] | None = None
        self.skipped: tuple[str, ...] = ()
        self.abandoned = False
        self.attempts = 0
        self.foreseen: float | None = None

    @property
    def peak(self) -> int:
        """The audited peak of the last attempt; 0 for a graph without a backward."""
        return max(self.peaks.values(), default=0)

    @property
    def _taken(self) -> int:
        """The audited peak without what is left free for other graphs."""
        return max((size - self.around.spare * (phase == "loss") for phase, size in self.peaks.items()), default=0)

    def attempt(self, attempts: int) -> Callable[..., Any] | None:
        """The step of the first plan whose audited peak is within the budget; None when `attempts` fail.

        It fails as well when the planner, by what audits found so far, sees no plan any more.
        """
        while self.attempts < attempts:
            try:
                compiled = self.generate()
            except BudgetInfeasibleError:
                return None
            if compiled is not None:
                return compiled
        return None

    def generate(self) -> Callable[..., Any] | None:
        """Plan and generate code; the step, whose kernels `load` compiles. None when the audit rejects it."""
        self.attempts += 1
        self.compiled = self._run()
        return self.compiled

    def load(self) -> None:
        """Compile the kernels of what was generated."""
        self.kernels.load(self.traced.options.inductor_config())

    def pose(self) -> pipeline.Job | None:
        """The job up to the planning problem; None for a graph without a backward."""
        return self._trace(("plan", "rewrite", "volume_kernels"))

    def plan(self, posed: pipeline.Job | None = None) -> pipeline.Job | None:
        """The job up to the plan; None for a graph without a backward.

        `posed` is a job of this route up to the problem, which saves the trace. The budget and the number of slices
        that are held may be others now.
        """
        if posed is None:
            return self._trace(("rewrite", "volume_kernels"))
        self.job = replace(posed, options=self.traced.options, slicing=self.route.slicing, bounds=self.bounds)
        pipeline.plan(self.job)
        return self.job

    def _trace(self, skipped: tuple[str, ...]) -> pipeline.Job | None:
        """The job after all passes but the `skipped` ones, without code."""
        self.skipped = skipped
        try:
            self._run()
        finally:
            self.skipped = ()
        return self.job

    def _run(self) -> Callable[..., Any] | None:
        self.abandoned, self.job, self.peaks = False, None, {}
        try:
            return self._compile()
        except Exception as error:
            if self.abandoned:
                return None
            raise find_ours(error) or error from None

    def _compile(self) -> Callable[..., Any]:
        options, slicing = self.traced.options, self.route.slicing
        gm, inputs = copied(self.traced.gm), self.traced.example_inputs
        if slicing is not None:
            whole, inputs = inputs, slice_inputs(inputs, slicing)
            self.drawn = slice_graph(gm, whole, inputs, slicing.batch.size, slicing.samples)
            self.batch, inputs = slicing.batch.beside(self.drawn.batched), [*inputs, *self.drawn.parts]
        concatenated_replicate_padding(gm)
        budgeted = not options.plain
        if budgeted:
            reshape_free_instance_norm(gm)
            scatter_unpooling(gm)
            if self.route.relayout:
                volumes_channels_last(gm, options.draws_as_aten)
        sources = source_hash()
        machine = rates.specs(inputs)
        key = f"{sources} {options.fingerprint()} {self.around} {self.corrections} {self.bounds} {self.route} {machine}"
        config = {**options.inductor_config(), "custom_partitioner_fn": hooks.Partitioner(self._partition, key)}
        if budgeted:
            config.update(in_order(sources))
        self.kernels = hooks.Deferred()
        with (
            hooks.ahead_of_time_backward(),
            hooks.early_releases(budgeted),
            hooks.cheap_strides(budgeted),
            hooks.fusion_rules(LocalFusion(CALLED) if budgeted else None),
            hooks.generated_code(self._generated),
            self.kernels.collect(),
        ):
            compiled = hooks.compile_graph(gm, inputs, config, self._entering)
        if slicing is None:
            return compiled
        if self.job is not None and self.job.draws == NOTHING:
            slicing = replace(slicing, draws=NOTHING)
        return Sliced(compiled, slicing, Result.of(self.traced.gm), self.drawn)

    def _partition(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **arguments: Any) -> Any:
        job = pipeline.Job(
            gm, joint_inputs, arguments, self.traced.options, self.around, dict(self.corrections),
            stream=self.traced.session.stream, batch=self.batch, slicing=self.route.slicing,
            saved=self.route.saved, device=self.traced.session.device, goes_on=self.traced.graph.goes_on,
            calls=self.traced.calls, bounds=self.bounds,
        )  # fmt: skip
        self.job = job
        pipeline.run(job, disabled=self.skipped)
        if self.skipped:
            self.abandoned = True
            raise _Abandoned
        assert job.pair is not None
        return job.pair.forward, job.pair.backward

    def _entering(self, gm: fx.GraphModule, example_inputs: Sequence[Any], is_backward: bool) -> None:
        """Inductor is about to generate code for this half."""
        self.half = (gm, list(example_inputs), is_backward)

    def _generated(self, code: str) -> None:
        """Audit generated code; abandon the graph when it is over the budget."""
        if self.job is None or self.job.plan is None or self.half is None:
            return  # A graph without a backward: nothing was planned.
        for where, peak in self._replay(code, *self.half):
            self.peaks[where] = max(self.peaks.get(where, 0), self._whole_step(where, peak))
            log.debug("audit: %s reaches %d bytes at %s; alive: %s", where, peak.bytes, peak.at, peak.alive)
        if self.attempts == 1:
            predicted = max(peak for phase, peak in self.job.phase_peaks.items() if phase in self.peaks)
            self.foreseen = predicted / self.peak
        budget = self.job.plan.budget
        if self.enforced and budget is not None and self.peak > (usable := self.traced.options.usable(budget)):
            self._tighten(usable)
            self.abandoned = True
            raise _Abandoned

    def _whole_step(self, phase: str, peak: Peak) -> int:
        """The peak of a phase over all slices and calls, from that of one of them."""
        assert self.job is not None and self.job.posed is not None
        moments = scenarios(self.route.slicing, self.job.posed.calls, self.job.posed.ends)
        held = self.audit.saved_bytes
        whole = max(peak.bytes + s.extra + s.others * held for s in moments if s.phase == phase)
        return whole + self.drawn.bytes

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
        assert self.job.posed is not None
        ends = self.job.posed.ends
        if is_backward:
            self.audit.hold(ends.kept + self.around.returning)
            return [("backward", self.audit.backward(code, inputs, [is_tangent(node) for node in placeholders]))]
        self.audit = Audit(self.around.throughout)
        forward = self.audit.forward(code, inputs, self.job.pair.results)
        results: Any = output_node(gm.graph).args[0]
        own = dict.fromkeys(node for node in results[: self.job.pair.results] if isinstance(node, fx.Node))
        # The caller makes float32 of 16-bit results.
        self.audit.hold(max(0, ends.results - sum(nbytes(node) for node in own if not is_primal(node))))
        return [("forward", forward), ("loss", self.audit.loss(ends.between + self.around.inside + self.around.spare))]

    def report(self, **known: Any) -> Plan | None:
        """Publish the plan of what was compiled, with what is `known` about it besides; None without a backward."""
        if self.job is None or self.job.plan is None:
            log.info("a graph without a backward: plain Inductor")
            return None
        found = {
            "saved_share": self.route.saved,
            "audited_peak": self._taken or None,
            "attempts": max(self.attempts, 1),
            "foreseen": self.foreseen,
            **self.traced.session.facts,
            **known,
            **self.traced.session.of_step(self.traced.graph.key),
        }
        unknown = tuple(f"what {name} allocates inside its calls is not known" for name in self.audit.uncounted)
        plan = replace(self.job.plan, notes=(*self.job.plan.notes, *self.traced.notes, *unknown), **found)
        publish(plan)
        assert self.job.posed is not None
        posed = self.job.posed
        self.traced.session.add(
            GraphRecord(self.traced.graph, plan, posed.problem, posed.ends.results, held=self._held(posed, plan))
        )
        return plan

    def _held(self, posed: Posed, plan: Plan) -> int:
        """Bytes that one call holds from its forward to its backward, its results included: audited if it was."""
        slicing = self.route.slicing
        if slicing is None:
            return self.audit.held_bytes or posed.rest + posed.ends.results + plan.saved_after // plan.calls
        slice_holds = self.audit.saved_bytes or posed.rest + sum(choice.bytes_after for choice in plan.choices)
        return slicing.held * slice_holds + slicing.count * posed.ends.results + slicing.copies
