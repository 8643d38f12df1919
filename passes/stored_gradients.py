"""A gradient that stands for several others gets memory of its own, so that theirs is free.

Inductor inlines an elementwise value into all of its readers, and what it is computed from stays until the last of
them. In a residual network the gradient of a block's input is the sum of two. The reductions and loops of a
normalisation read it, and so does the sum of the block before: along a stage, the gradients of all blocks stay. In a
buffer of its own such a sum takes the place of one of its terms, and readers read it instead of all terms.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from .graph import closure, inline, is_elementwise, is_reduction, is_tangent, is_view, nbytes, origin_meta
from .liveness import readers

# Bytes that are freed, over those of the value, for which it is written and read once more.
WORTH = 1.5


def store_gradients(graph: fx.Graph) -> None:
    """Rewrite a backward graph in place: its sums are stored. One that is stored may make a sum of what reads it."""
    for node in sums(graph):
        _store(graph, node)


def sums(graph: fx.Graph) -> Iterator[fx.Node]:
    """Gradients of a backward graph that several operations read, and with which more bytes die than they have.

    In the graph's order, each looked for when the one before it was taken.
    """
    return filter(_is_sum, sorted(closure(node for node in graph.nodes if is_tangent(node))))


def _is_sum(node: fx.Node) -> bool:
    if not is_elementwise(node) or len(node.users) < 2:
        return False
    inlined = all(is_elementwise(reader) or is_reduction(reader) for reader in readers(node))
    return inlined and sum(map(nbytes, _dying(node))) >= WORTH * nbytes(node)


def _dying(node: fx.Node) -> list[fx.Node]:
    """The buffers made in this graph that no operation reads any more when the value is there."""
    inlined, sources = {node}, dict[fx.Node, None]()
    stack = list(node.all_input_nodes)
    while stack:
        read = stack.pop()
        if (is_elementwise(read) or is_view(read)) and all(user in inlined for user in read.users):
            inlined.add(read)
            stack += read.all_input_nodes
        elif read.op != "placeholder":
            sources[read] = None
    return [source for source in sources if not is_view(source) and _is_read_before(source, node, inlined)]


def _is_read_before(source: fx.Node, node: fx.Node, inlined: set[fx.Node]) -> bool:
    """Whether all that reads a buffer, in loops that it is inlined into as well, comes before or is of the value's."""
    seen = set(inlined)
    stack = list(source.users)
    while stack:
        user = stack.pop()
        if user in seen:
            continue
        if user > node:
            return False
        seen.add(user)
        if is_elementwise(user) or is_view(user):
            stack += user.users
    return True


def _store(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_after(node):
        (stored,) = inline(graph, torch.ops.xconv.stored, [node], origin_meta(node))
    node.replace_all_uses_with(stored, delete_user_cb=lambda user: user is not stored)
