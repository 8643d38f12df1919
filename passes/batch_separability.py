"""Whether a graph treats the samples of a batch apart, so that it may run on one slice of the batch after another.

A network without batch statistics computes every sample's result from that sample and the parameters alone. Then the
result of a batch is the results of its slices, put together, and the gradient of every parameter is the sum over them:
exactly, whatever the slices' size. The activations that are alive at once shrink with the slice.

The proof is by following the batch dimension through the forward's operations (`sample_dims.py`). An operation passes
when it computes each sample of its result from the same sample of its operands (`batch_rules.py`); one that is not
known to do so stops the proof. What stops it most often is the reduction over the batch in batch normalisation.

Random draws are either one for each sample, which slices may make anew, or shared by the whole batch, which all slices
must make alike. What the forward changes in place, buffers and inputs, must be computed sample by sample as well, or
from what is shared.

Known gaps: results that are no batch (a loss computed inside the model) stop the proof, and so do draws of both kinds
in one graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from xconv_fx import hooks

from .batch_rules import elementwise, rule_of
from .graph import ancestors, arguments, is_primal, is_tangent, output_node, prims, shape_of, tensor_of
from .sample_dims import Dim, Mixing, SampleDims, Shared
from .shared_values import shared_value

# What a graph draws: nothing, one number (or more) for each sample, or numbers that all samples share.
NOTHING, SAMPLES, BATCH = "nothing", "samples", "batch"


@dataclass(frozen=True)
class Separability:
    """What slices of a batch need to know of a joint graph.

    `mixing` is why the batch cannot be sliced, "" when it can; `draws` one of `NOTHING`, `SAMPLES` and `BATCH`;
    `changed` are the indices of the inputs that the forward changes in place.
    """

    mixing: str = ""
    draws: str = NOTHING
    changed: tuple[int, ...] = ()


def separability(joint: fx.GraphModule, batched: Sequence[bool], batch: int, results: int) -> Separability:
    """Whether a joint graph may run on slices of its batch, and how.

    `batched[i]` says whether the i-th input holds `batch` samples along its first dimension; the first `results`
    outputs are the forward's.
    """
    placeholders = [node for node in joint.graph.find_nodes(op="placeholder") if is_primal(node)]
    if len(placeholders) != len(batched):
        return Separability("inputs share memory")
    inputs = {node: 0 for node, is_batched in zip(placeholders, batched, strict=True) if is_batched}
    outputs = [node for node in arguments(output_node(joint.graph))[0][:results] if isinstance(node, fx.Node)]
    try:
        changes = hooks.changed_inputs(joint.graph, results)
        draws = _draws(outputs, inputs, batch, changes)
    except Mixing as found:
        return Separability(str(found))
    except hooks.ChangedElsewhere as found:
        return Separability(str(found))
    changed = sorted(placeholders.index(node) for node in changes)
    if any(arguments(output_node(joint.graph))[0][results + place] is not None for place in changed):
        return Separability("a parameter is changed in place")
    return Separability("", draws, tuple(changed))


def _draws(
    results: Sequence[fx.Node], inputs: Mapping[fx.Node, int], batch: int, changes: Mapping[fx.Node, fx.Node]
) -> str:
    """What is drawn by a graph that treats samples apart. Raises `Mixing` where it does not.

    A draw of the batch's size is first taken for one number a sample, then for the batch's.
    """
    try:
        return check_separable(results, inputs, batch, changes)
    except Mixing as found:
        if not any(_is_draw(node) for node in ancestors([*results, *changes.values()])):
            raise
        try:
            return check_separable(results, inputs, batch, changes, all_share_draws=True)
        except Mixing:
            raise found from None


def check_separable(
    results: Sequence[fx.Node],
    inputs: Mapping[fx.Node, int],
    batch: int,
    changes: Mapping[fx.Node, fx.Node] | None = None,
    all_share_draws: bool = False,
) -> str:
    """What is drawn, if every result is computed sample by sample. Raises `Mixing` otherwise.

    `results` are forward values, `inputs` the placeholders that hold samples, with the dimension of the batch; `batch`
    is its size. The dimension of every result must be its first, with one index for a sample. `changes` are inputs that
    are changed in place, and their new values. `all_share_draws` takes no draw for one of each sample's own.
    """
    dims = _Proof(dict(inputs), batch, all_share_draws)
    changed = dict(changes or {})
    for node in ancestors([*results, *changed.values()]):
        dims.visit(node)
    for node in results:
        value = tensor_of(node)
        if value is None or dims.of(node) != 0 or int(value.shape[0]) != batch:
            raise Mixing(node, "a result of the model is not one row for each sample")
    for given, new in changed.items():
        if any(is_tangent(source) for source in ancestors([new])):
            raise Mixing(given, "the backward changes a buffer or an input in place")
        if dims.is_batched(given) and dims.of(new) != 0:
            raise Mixing(new, "an input is changed in place, and not sample by sample")
        if not dims.is_batched(given) and dims.is_batched(new):
            raise Mixing(new, "a buffer is changed in place, by what is computed from samples")
    return dims.drawn()


class _Proof(SampleDims):
    """Visits operations in the order in which they run."""

    def __init__(self, known: dict[fx.Node, int], batch: int, all_share_draws: bool) -> None:
        super().__init__(known, batch)
        self.all_share_draws = all_share_draws
        self.own: fx.Node | None = None
        self.common: fx.Node | None = None

    def drawn(self) -> str:
        if self.own is not None and self.common is not None:
            raise Mixing(self.common, "a draw that all samples share, besides draws of each sample's own")
        return SAMPLES if self.own is not None else BATCH if self.common is not None else NOTHING

    def visit(self, node: fx.Node) -> None:
        if node in self.found or node.op == "output":
            return
        if node.op in ("placeholder", "get_attr"):
            self.found[node] = Shared()
        elif any(self.is_batched(arg) for arg in node.all_input_nodes):
            self.found[node] = self.batched_result(node)
        elif _is_draw(node):
            self.found[node] = self.draw(node)
        else:
            self.found[node] = shared_value(self, node)

    def batched_result(self, node: fx.Node) -> Dim:
        rule = rule_of(node)
        if _is_draw(node):
            self.own = node
            if shape_of(node) == shape_of(node.all_input_nodes[0]):
                rule = rule or elementwise
        if rule is None:
            raise Mixing(node, f"{node.target} is not known to treat samples apart")
        return rule(self, node)

    def draw(self, node: fx.Node) -> Dim:
        """A draw that reads no samples: of each sample's own where a dimension has the batch's size."""
        shape = shape_of(node)
        places = [axis for axis, size in enumerate(shape) if size == self.batch]
        places += [axis for axis, size in enumerate(shape) if size and size % self.batch == 0]
        if places and not self.all_share_draws:
            self.own = node
            return places[0]
        self.common = node
        return Shared()


def _is_draw(node: fx.Node) -> bool:
    """Whether the values are random numbers. Seeds are not: one number each, of which any will do."""
    if getattr(node.target, "namespace", "") == "prims" and "inductor" in str(node.target):
        return node.target in (prims.inductor_random.default, prims.inductor_randint.default)
    return hooks.draws(node) and getattr(node.target, "namespace", "") != "xconv"
