"""Write instance normalisation in the activation's own shape.

ATen computes it as a batch normalisation of the input reshaped from (N, C, ...) to (1, N C, ...). That reshape fixes a
contiguous layout in the midst of channels-last convolutions: Inductor copies the whole activation before and after,
in the forward and again in the backward. The same mathematics over the spatial dims needs no reshape.

Works on the graph that Dynamo traced, before autograd sees it; the gradient is autograd's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_TARGETS = (torch.instance_norm, torch.nn.functional.instance_norm, torch.ops.aten.instance_norm.default)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """`torch.nn.functional.instance_norm` without running statistics: x (N, C, ...) to the same shape.

    Statistics are taken in float32 for 16-bit inputs, as ATen does.
    """
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    variance, mean = torch.var_mean(wide, dim=list(range(2, x.dim())), correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    if weight is not None:
        scale = scale * weight.view(shape)
    y = (wide - mean) * scale
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)


def reshape_free_instance_norm(gm: fx.GraphModule) -> None:
    """Rewrite a Dynamo graph in place. Calls with running statistics stay as they are."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _TARGETS and _is_plain(node):
            with gm.graph.inserting_before(node):
                replacement = _expand(gm.graph, node)
            node.replace_all_uses_with(replacement)
            gm.graph.erase_node(node)
    gm.recompile()


def _is_plain(node: fx.Node) -> bool:
    arguments = dict(
        zip(("x", "running_mean", "running_var", "weight", "bias", "use_input_stats"), node.args, strict=False)
    )
    arguments.update({"x": arguments.get("x", node.kwargs.get("input")), **node.kwargs})
    given = arguments.get("use_input_stats", True)
    value = arguments["x"].meta.get("example_value") if isinstance(arguments["x"], fx.Node) else None
    no_statistics = arguments.get("running_mean") is None and arguments.get("running_var") is None
    return no_statistics and bool(given) and isinstance(value, Tensor) and value.dim() > 2


def _expand(graph: fx.Graph, node: fx.Node) -> fx.Node:
    kwargs = dict(node.kwargs)
    if "input" in kwargs:
        kwargs["x"] = kwargs.pop("input")
    expanded = graph.call_function(instance_norm, node.args, kwargs)
    expanded.meta = dict(node.meta)
    return expanded
