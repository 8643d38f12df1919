"""Operations that do nothing: Inductor takes them out of a joint graph, and gives their metadata to what they read.

The convolution before a softplus is then said to be a part of the softplus's backward, as `x * beta` there is: layer,
line, sequence number and all. torch 2.12 and 2.13 do so where a tensor of ones multiplies, from 2.14 on a number does
as well. Here what stays keeps its own metadata.

Private parts of PyTorch, read in torch 2.12 to 2.15: `torch/_inductor/fx_passes/joint_graph.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import fx


@contextlib.contextmanager
def own_metadata() -> Iterator[None]:
    """While active, Inductor's removal of operations leaves the metadata of all others as they are."""
    from torch._inductor.fx_passes import joint_graph

    no_ops, views = joint_graph.remove_no_ops, joint_graph.remove_redundant_views
    with (
        mock.patch.object(joint_graph, "remove_no_ops", _keeping(no_ops)),
        mock.patch.object(joint_graph, "remove_redundant_views", _keeping(views)),
    ):
        yield


def _keeping(remove: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(remove)
    def removing(gm: fx.GraphModule, *arguments: Any) -> None:
        before = {node: dict(node.meta) for node in gm.graph.nodes}
        remove(gm, *arguments)
        for node in gm.graph.nodes:
            node.meta = before.get(node, node.meta)

    return removing
