"""Views by shape in the place of views by stride, where both are the same.

A decomposition of PyTorch (group normalisation's, of small images) writes the reshaping of a dense tensor as
`as_strided`. That says where elements lie in memory, which holds for the graph that it was traced in: the backward that
computes such a tensor again may lay it out in another way, and then reads other elements. As `view` it means the same
wherever it is computed.
"""

from __future__ import annotations

import torch
from torch import fx

from .graph import is_primal

aten = torch.ops.aten


def name_shapes(joint: fx.GraphModule) -> None:
    """Rewrite the graph in place; views of inputs, which lie in memory as they do, are left."""
    for node in joint.graph.find_nodes(op="call_function", target=aten.as_strided.default):
        source = node.all_input_nodes[0]
        if not is_primal(source) and _is_reshaped(source.meta["val"], node.meta["val"]):
            with joint.graph.inserting_before(node):
                view = joint.graph.call_function(aten.view.default, (source, list(node.meta["val"].shape)))
            view.meta = dict(node.meta)
            node.replace_all_uses_with(view)
            joint.graph.erase_node(node)
    joint.graph.lint()


def _is_reshaped(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether both show all elements of one dense tensor, in the same order."""
    dense = before.is_contiguous() and after.is_contiguous() and before.numel() == after.numel()
    return dense and before.storage_offset() == after.storage_offset()
