"""Small questions about FX graphs that several passes ask: sizes, kinds of operation, what reaches what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from xconv_fx import hooks
from xconv_fx.cost_model.allocator import allocated_bytes
from xconv_fx.hooks.dispatch import OpOverload

from .op_table import has
from .provenance import layer_of as layer_of
from .provenance import origin_meta as origin_meta
from .provenance import source_of as source_of

aten = torch.ops.aten
prims = torch.ops.prims


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The node's positional arguments: what each one is follows from the operation, which a type checker cannot see."""
    return node.args


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that a node stands for, or None (symbols, tuples, nothing)."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def nbytes(node: fx.Node) -> int:
    """Bytes of the node's tensor, 0 where it is none. Expanded dims count in full, on CUDA allocator's blocks."""
    value = tensor_of(node)
    if value is None:
        return 0
    size = prod(int(n) for n in value.shape) * value.element_size()
    return allocated_bytes(size, value.device.type)


def numel(node: fx.Node) -> int:
    value = tensor_of(node)
    return 0 if value is None else prod(int(n) for n in value.shape)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of the node's tensor, or of the first where it returns several; () where it is none."""
    value = node.meta.get("val")
    tensor = value[0] if isinstance(value, (tuple, list)) else value
    return tuple(int(n) for n in tensor.shape) if isinstance(tensor, torch.Tensor) else ()


def is_view(node: fx.Node) -> bool:
    """Whether the node shares its input's memory (or picks from a tuple): it owns no buffer."""
    if node.op != "call_function":
        return False
    return has(node, "view") or getattr(node.target, "__name__", "") == "getitem"


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows; the node itself where it is none, also if it is an element of a tuple."""
    while has(node, "view") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and "tangents" in str(node.target)


def is_primal(node: fx.Node) -> bool:
    return node.op == "placeholder" and str(node.target).startswith("primals")


def is_elementwise(node: fx.Node) -> bool:
    """Whether Inductor generates this operation as a loop over its output that it may fuse or inline."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.pointwise in node.target.tags:
        return True
    return has(node, "pointwise") or (node.target.namespace == "xconv" and node.target.name() not in _STORED)


# Operators of ours for code without this compiler (`ops/sketched_layers.py`, `ops/masked_relu.py`), which are calls as
# ATen's are; and one whose operand and result are stored.
_STORED = {
    f"xconv::{name}"
    for name in ("draw_seed", "masked_relu", "sketched_convolution", "sketched_linear", "interpolate_backward")
}


def is_reduction(node: fx.Node) -> bool:
    """Whether the operation reduces (sums, means, extrema, moments)."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    return torch.Tag.reduction in node.target.tags or has(node, "reduction")


def closure(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The roots and everything computed from them."""
    return _reached(roots, lambda node: node.users)


def ancestors(results: Iterable[fx.Node]) -> list[fx.Node]:
    """The results and everything that they are computed from, in the graph's order."""
    return sorted(_reached(results, lambda node: node.all_input_nodes))


def _reached(roots: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack += neighbours(node)
    return reached


def first_operation(graph: fx.Graph) -> fx.Node:
    """The first node that is no placeholder."""
    return next(node for node in graph.nodes if node.op != "placeholder")


def output_node(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def inline(
    graph: fx.Graph, function: Callable[..., Any], arguments: Sequence[fx.Node], meta: dict[str, Any] | None = None
) -> list[fx.Node]:
    """Trace `function` on the arguments' fake tensors and copy its operations to the graph's insertion point.

    Returns the nodes of its outputs, in order. `meta` (module stack, stack trace) is put on every new node, so that
    what a rewrite adds keeps the origin of what it replaces.
    """
    values = [node.meta["val"] for node in arguments]
    mode = hooks.fake_mode_of([tensor_of(node) for node in graph.nodes if node.op == "placeholder"])
    with mode if mode is not None else torch.no_grad():
        traced = make_fx(function, decomposition_table=hooks.decompositions(), tracing_mode="real")(*values)
    traced.graph.eliminate_dead_code()
    inner = [node for node in traced.graph.nodes if node.op == "placeholder"]
    environment: dict[fx.Node, fx.Node] = dict(zip(inner, arguments, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            environment[node] = graph.node_copy(node, lambda old: environment[old])
            environment[node].meta = {
                **(meta or {}),
                **{k: v for k, v in node.meta.items() if k in ("val", "tensor_meta")},
            }
    result = output_node(traced.graph).args[0]
    results = result if isinstance(result, (list, tuple)) else [result]
    return [map_arg(item, lambda old: environment[old]) for item in results]  # type: ignore[arg-type, misc]
