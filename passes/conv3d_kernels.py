"""3D convolutions by the operators of `xconv_fx.ops.conv3d`, where those are worth it.

The last pass: all others see `aten.convolution`, and the memory model counts what this pass makes of it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from xconv_fx.hooks.dispatch import OpOverload
from xconv_fx.ops.conv3d import arguments_for, operator_for

from .graph import arguments

aten = torch.ops.aten


def volume_kernels(graph: fx.Graph) -> None:
    """Rewrite a forward or backward graph in place."""
    for target in (aten.convolution.default, aten.convolution_backward.default):
        for node in graph.find_nodes(op="call_function", target=target):
            values: Any = fx.node.map_arg(node.args, lambda arg: arg.meta["val"])
            kernel = operator_for(target, values)
            if kernel is not None:
                _replace(graph, node, kernel, values)
    graph.lint()


def _replace(graph: fx.Graph, node: fx.Node, kernel: OpOverload, values: Any) -> None:
    with graph.inserting_before(node):
        replaced = graph.call_function(kernel, arguments_for(kernel, node.args, values))
    replaced.meta = {**node.meta, "val": kernel(*arguments_for(kernel, values, values))}
    if node.target is aten.convolution.default:
        node.replace_all_uses_with(replaced)
    else:
        for item in list(node.users):
            assert item.target is operator.getitem
            place = arguments(item)[1] - 1
            item.args = (replaced, place)
            item.meta["val"] = replaced.meta["val"][place]
    graph.erase_node(node)
