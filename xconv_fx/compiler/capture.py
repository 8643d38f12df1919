"""What is compiled, and what was traced and found of it for each variant: once, for planning and for every attempt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import fx

from xconv_fx import hooks
from xconv_fx.errors import find_ours
from xconv_fx.fingerprint import source_hash
from xconv_fx.hooks.capture import Capture, copied
from xconv_fx.hooks.dispatch import OpOverload
from xconv_fx.hooks.scheduler import LocalFusion, in_order
from xconv_fx.ops import conv3d
from xconv_fx.options import Options, Probes
from xconv_fx.options.budget import Budget
from xconv_fx.options.codecs import CodecSet
from xconv_fx.passes.channels_last_3d import volume_convolutions, volumes_channels_last
from xconv_fx.passes.graph import tensor_of
from xconv_fx.passes.instance_norm import reshape_free_instance_norm
from xconv_fx.passes.interpolation import gather_interpolation
from xconv_fx.passes.op_table import operators_with
from xconv_fx.passes.replicate_padding import concatenated_replicate_padding
from xconv_fx.passes.slice_graph import Drawn, slice_graph
from xconv_fx.passes.unpooling import scatter_unpooling
from xconv_fx.planner.microbatches import Batch
from xconv_fx.planner.peak_scenarios import Calls
from xconv_fx.planner.problem import PlanningProblem, beside
from xconv_fx.planner.surroundings import Surroundings
from xconv_fx.runtime.microbatch_step import slice_inputs
from xconv_fx.runtime.session import TOGETHER, Graph, Session

from .candidates import FULL_BATCH, Variant, compared_variant
from .pipeline import Analysed, Joint, analyse, with_stored_gradients

T = TypeVar("T")

# A batch that was not looked for.
_UNSEEN = Batch(0, (), 0, 0, 0)
# Whose operators are what they are by the versions of torch and of this package.
_NAMESPACES = {"aten", "prims", "prim", "xconv", "inductor", "inductor_prims", "mkldnn", "quantized", "rngprims"}
# Operators that run as calls, between which no kernels are fused.
CALLED = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
    *operators_with("product"),
    *conv3d.OPERATORS,
)
# Operators whose results are made where they stand.
LATE = (torch.ops.xconv.apart.default,)


@dataclass(frozen=True)
class Compiling:
    """What Inductor is given besides a graph: a partitioner, and who is told of each half and of its code."""

    partition: Callable[..., Any]
    entering: Callable[[fx.GraphModule, Sequence[Any], bool], None] = lambda *_: None
    generated: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Prepared:
    """Dynamo's graph for one variant, before AOTAutograd traces it, and the inputs that it is traced for.

    `drawn` is what the graph of a slice takes besides its inputs, `batch` says which of all hold samples. Two graphs of
    one `kind` are the same.
    """

    gm: fx.GraphModule
    inputs: Sequence[Any]
    batch: Batch | None
    drawn: Drawn
    kind: tuple[object, ...]


@dataclass(frozen=True)
class JointText:
    """A joint graph as text, to be compared; `known` says that nothing in it is an operator of the user's."""

    text: str
    known: bool

    @staticmethod
    def of(gm: fx.GraphModule) -> JointText:
        """With the sizes and layouts of all values, and the graphs inside of it."""
        parts, known = [str(gm.graph)], True
        for node in gm.graph.nodes:
            value = tensor_of(node)
            if value is not None:
                parts.append(f"{node.name} {tuple(value.shape)} {value.stride()} {value.dtype} {value.device}")
            if isinstance(node.target, OpOverload):
                known &= node.target.namespace in _NAMESPACES
        for name, child in gm.named_children():
            if isinstance(child, fx.GraphModule):
                inner = JointText.of(child)
                parts.append(f"{name}: {inner.text}")
                known &= inner.known
        return JointText("\n".join(parts), known)


@dataclass(frozen=True)
class CaptureRequest:
    """The graph that Dynamo traced, and what it is compiled with.

    `known` is what is known of it, and `surroundings` what it is planned beside, where its session is not asked.
    `batch` are the inputs that hold samples, if any do, which the graph tells only while Dynamo compiles it.
    `found` is what was traced, which requests for the same graph by other options share.
    """

    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    options: Options
    session: Session
    notes: tuple[str, ...] = ()
    known: Graph | None = None
    surroundings: Surroundings | None = None
    batch: Batch | None = _UNSEEN
    found: Found = field(default_factory=lambda: Found())

    def __post_init__(self) -> None:
        if self.batch is _UNSEEN:
            object.__setattr__(self, "batch", Batch.of(self.gm, self.example_inputs))

    @functools.cached_property
    def graph(self) -> Graph:
        """What its session knows it by."""
        return self.known or self.session.graph(self.gm)

    @property
    def calls(self) -> Calls:
        """How often it runs in a step. Gradients of graphs that are planned together are in their surroundings."""
        graph, chain = self.graph, self.graph.given < self.graph.inputs
        if graph.key.frame == TOGETHER:
            return Calls(self.options.calls, graph.given, chain=chain)
        return Calls(self.options.calls, graph.given, graph.parameters, chain, self._input_gradients())

    def _input_gradients(self) -> int:
        """Bytes of the gradients of inputs that are no parameters, and that nothing in the step computes."""
        given = zip(self.example_inputs, hooks.data_inputs(self.gm), strict=True)
        leaves = (value for value, is_data in given if is_data and value.is_leaf and value.requires_grad)
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves)

    @functools.cached_property
    def around(self) -> Surroundings:
        """What is alive in the step besides it. Raises `BudgetInfeasibleError` where the step cannot be planned."""
        return self.surroundings or self.session.surroundings(self.graph)

    def within(self, budget: int) -> CaptureRequest:
        """The same under a budget in bytes."""
        return replace(self, options=replace(self.options, mem_budget=Budget(bytes=budget)))

    def plain(self) -> CaptureRequest:
        """The same as Inductor compiles it by itself."""
        return replace(
            self,
            options=replace(self.options, mem_budget=None, probes=Probes(), codecs=CodecSet(), slices=None, plan=None),
        )

    def analysed(self, variant: Variant) -> Analysed | None:
        """What is found of a variant, of one slice where it has slices; None for a graph without a backward."""
        return self.found.analysed(self, variant)

    def problem(self, variant: Variant) -> PlanningProblem | None:
        """The planning problem of a variant, of one slice where it has slices; None for a graph without a backward."""
        return self.found.problem(self, variant)


def noted(request: CaptureRequest, notes: tuple[str, ...]) -> CaptureRequest:
    """A request with further notes."""
    return replace(request, notes=(*request.notes, *(note for note in notes if note not in request.notes)))


class Found:
    """What was traced of one Dynamo graph, and what was found in that. Each is looked for when it is first needed."""

    def __init__(self) -> None:
        self._prepared: dict[tuple[bool, Variant], Prepared] = {}
        self._captures: dict[tuple[object, ...], Capture] = {}
        self._analysed: dict[tuple[bool, Variant], Analysed | Exception | None] = {}
        self._problems: dict[tuple[bool, Variant], list[tuple[tuple[object, ...], PlanningProblem]]] = {}
        self._compiled: tuple[Callable[..., Any], hooks.Deferred] | None = None

    def analysed(self, request: CaptureRequest, variant: Variant) -> Analysed | None:
        """As `CaptureRequest.analysed`."""
        key = request.options.plain, compared_variant(variant)
        if key not in self._analysed:
            try:
                self._analysed[key] = self._analyse(request, key[1])
            except Exception as error:
                self._analysed[key] = error
        found = self._analysed[key]
        if isinstance(found, Exception):
            raise found
        return found

    def problem(self, request: CaptureRequest, variant: Variant) -> PlanningProblem | None:
        """As `CaptureRequest.problem`."""
        analysed = self.analysed(request, variant)
        if analysed is None:
            return None
        known = self._problems.setdefault((request.options.plain, compared_variant(variant)), [])
        given = request.options.of_problem(), request.graph.goes_on, request.calls
        problem = next((problem for before, problem in known if before == given), None)
        if problem is None:
            problem = analysed.problem(*given, sliced=variant.microbatches is not None)
            known.append((given, problem))
        return beside(problem, request.around)

    def look_at_joint(self, request: CaptureRequest, look: Callable[[JointText], bool]) -> None:
        """Show `look` the joint graph of the batch at once as AOTAutograd traced it, if the graph has a backward.

        What is to be found in it is found on the way where `look` says that it will be asked for.
        """
        analysed = self._analyse(request, FULL_BATCH, lambda gm: look(JointText.of(gm)))
        if analysed is not None:
            self._analysed[request.options.plain, FULL_BATCH] = analysed

    def _analyse(
        self, request: CaptureRequest, variant: Variant, wanted: Callable[[fx.GraphModule], bool] = lambda _: True
    ) -> Analysed | None:
        """What is found of a variant if its joint graph is `wanted`; None for a graph without a backward."""
        if variant.store_gradients:
            inlined = self.analysed(request, replace(variant, store_gradients=False))
            return None if inlined is None else with_stored_gradients(inlined)
        prepared, microbatches = self.prepared(request, variant), variant.microbatches
        whole = 0 if prepared.batch is None else prepared.batch.size
        samples = whole if microbatches is None else microbatches.samples
        device, plain = request.session.device, request.options.plain

        def look(gm: fx.GraphModule, joint_inputs: Sequence[object], **arguments: Any) -> Analysed | None:
            if not wanted(gm):
                return None
            return analyse(Joint(gm, joint_inputs, arguments, prepared.batch, samples, variant.saved, device, plain))

        return self._seen(request, variant, look)

    def _seen(self, request: CaptureRequest, variant: Variant, look: Callable[..., T]) -> T | None:
        """What `look` makes of the partitioner's arguments, after which nothing is compiled; None without a backward,
        of which the compilation is kept."""
        found: list[T] = []

        def partition(*arguments: Any, **named: Any) -> Any:
            found.append(look(*arguments, **named))
            raise _Enough

        try:
            self._compiled = self.compile(request, variant, Compiling(partition))
        except Exception as error:
            if not found:
                raise find_ours(error) or error from None
        return found[0] if found else None

    def forward_only(self) -> tuple[Callable[..., Any], hooks.Deferred]:
        """The compilation of a graph that was found to have no backward, and its kernels."""
        assert self._compiled is not None, "it was not looked for a backward, or has one"
        return self._compiled

    def prepared(self, request: CaptureRequest, variant: Variant) -> Prepared:
        """Dynamo's graph for a variant, rewritten where AOTAutograd would lose what is worth knowing."""
        key = request.options.plain, replace(compared_variant(variant), saved=1.0, store_gradients=False)
        if key not in self._prepared:
            self._prepared[key] = _prepare(request, *key)
        return self._prepared[key]

    def compile(
        self, request: CaptureRequest, variant: Variant, compiling: Compiling
    ) -> tuple[Callable[..., Any], hooks.Deferred]:
        """Inductor's compilation of a variant, and its kernels, which are to be compiled."""
        prepared, plain = self.prepared(request, variant), request.options.plain
        capture = self._captures.setdefault(prepared.kind, Capture())
        # What the code depends on besides the graph and Inductor's settings, both of which are in its keys.
        key = f"{source_hash()} {plain}"
        partitioner = hooks.Partitioner(compiling.partition, key)
        config = {**request.options.inductor_config(), "custom_partitioner_fn": partitioner}
        if not plain:
            config.update(in_order(key))
        kernels = hooks.Deferred()
        with (
            hooks.ahead_of_time_backward(),
            hooks.early_releases(not plain),
            hooks.cheap_strides(not plain),
            hooks.fusion_rules(None if plain else LocalFusion(CALLED, LATE)),
            hooks.generated_code(compiling.generated),
            kernels.collect(),
            capture.in_use(),
        ):
            compiled = hooks.compile_graph(copied(prepared.gm), prepared.inputs, config, compiling.entering)
        return compiled, kernels


class _Enough(Exception):
    """Ends a compilation that has given what it was run for."""


def _prepare(request: CaptureRequest, plain: bool, variant: Variant) -> Prepared:
    microbatches = variant.microbatches
    gm, inputs, batch, drawn = copied(request.gm), request.example_inputs, request.batch, Drawn()
    if microbatches is not None:
        whole, inputs = inputs, slice_inputs(inputs, microbatches)
        drawn = slice_graph(gm, whole, inputs, microbatches.batch.size, microbatches.samples)
        batch, inputs = microbatches.batch.beside(drawn.batched), [*inputs, *drawn.parts]
    concatenated_replicate_padding(gm)
    before = str(gm.graph)
    if not plain:
        reshape_free_instance_norm(gm)
        scatter_unpooling(gm)
        gather_interpolation(gm)
        if variant.relayout:
            gm = _channels_last(gm, inputs, request.options)
    same = str(gm.graph) == before
    return Prepared(gm, inputs, batch, drawn, (microbatches, same) if same else (microbatches, same, variant.relayout))


def _channels_last(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> fx.GraphModule:
    """The graph with volumes laid out channels-last; as it is where it takes views that these do not allow."""
    if not volume_convolutions(gm):
        return gm
    relaid = copied(gm)
    volumes_channels_last(relaid, options.draws_as_aten)
    views = any("view" in str(node.target) for node in relaid.graph.nodes)
    return gm if views and not hooks.runs_on_fakes(relaid, inputs) else relaid
