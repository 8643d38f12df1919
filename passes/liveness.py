"""When each buffer of a forward or backward graph comes to life and dies, as Inductor will run it.

Which values get memory is foreseen, not known: extern kernels (convolutions, matrix products) and reductions write
buffers, and read them; an elementwise value is inlined into its readers unless an extern kernel or the caller needs it;
views own nothing; the last elementwise reader of a buffer of its own size may overwrite it. What Inductor really does
is audited on the generated code (`xconv_fx/compiler/audit.py`); this model only has to rank plans.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from xconv_fx.device.workspace import node_workspace

from .graph import is_elementwise, is_reduction, is_view, nbytes, output_node, storage_root

# Inductor inlines a value with several readers until it reads this many buffers itself.
MANY_READS = 4


@dataclass(frozen=True)
class Buffer:
    """`node`'s memory, alive from step `first` to step `last`, both included. Bytes."""

    node: fx.Node
    first: int
    last: int
    bytes: int


@dataclass(frozen=True)
class Timeline:
    """The steps of one graph (the node that each computes), its buffers, and workspace bytes per step.

    `read_at` maps every value that a step reads from memory, placeholders included, to those steps, ascending.
    """

    steps: tuple[fx.Node, ...]
    buffers: tuple[Buffer, ...]
    workspace: tuple[int, ...]
    read_at: dict[fx.Node, list[int]]

    def profile(self) -> list[int]:
        """Bytes alive at every step."""
        total = list(self.workspace)
        for buffer in self.buffers:
            for step in range(buffer.first, buffer.last + 1):
                total[step] += buffer.bytes
        return total

    def step_of(self, node: fx.Node) -> int:
        """The first step at or after `node` in the graph's order."""
        return min(bisect_left(self.steps, node), len(self.steps) - 1)


def timeline(graph: fx.Graph, dropped: Iterable[fx.Node] = (), images_last: bool = True) -> Timeline:
    """Lifetimes of everything that the graph computes; its placeholders own no buffer here.

    `dropped` are returned values to treat as if they were not: they die after their last reader. `images_last` says
    that Inductor will lay out images channels-last.
    """
    roots = {node: storage_root(node) for node in graph.nodes}
    gone = set(dropped)
    returned = {roots[node] for node in output_node(graph).all_input_nodes if node not in gone}
    reads: dict[fx.Node, tuple[fx.Node, ...]] = {}
    stored: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function" or is_view(node):
            continue
        inputs: dict[fx.Node, None] = {}
        for root in (roots[arg] for arg in node.all_input_nodes):
            inlined = _maker(root) in reads and _maker(root) not in stored
            inputs.update(dict.fromkeys(reads[_maker(root)] if inlined else (root,)))
        reads[node] = tuple(inputs)
        if _is_stored(node, len(inputs), returned, roots):
            stored[node] = None
    return _lifetimes(list(stored), reads, returned, images_last)


def _maker(root: fx.Node) -> fx.Node:
    """The operation that makes a value: of an element of a tuple, what returns the tuple."""
    return root.all_input_nodes[0] if is_view(root) else root


def readers(node: fx.Node) -> list[fx.Node]:
    """The operations that read the node, through views."""
    found: list[fx.Node] = []
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if is_view(user):
            stack += user.users
        elif user.op != "output":
            found.append(user)
    return found


def _is_stored(node: fx.Node, reads: int, returned: set[fx.Node], roots: dict[fx.Node, fx.Node]) -> bool:
    if not is_elementwise(node) or node in returned or node.target is torch.ops.xconv.stored.default:
        return True
    found = set(readers(node))
    return any(not is_elementwise(r) and not is_reduction(r) for r in found) or (len(found) > 1 and reads > MANY_READS)


def _lifetimes(
    stored: list[fx.Node], reads: dict[fx.Node, tuple[fx.Node, ...]], returned: set[fx.Node], images_last: bool
) -> Timeline:
    step = {node: index for index, node in enumerate(stored)}
    for node in filter(_is_tuple, stored):
        # Each of its elements is a buffer of its own.
        step.update((user, step[node]) for user in node.users if is_view(user))
    last = {node: len(stored) - 1 if node in returned else index for node, index in step.items()}
    for node in stored:
        for source in reads[node]:
            if source in last and source not in returned:
                last[source] = max(last[source], step[node])
    for node in stored:
        if _overwrites(node) and (reused := _reusable(node, reads[node], step, last, returned)) is not None:
            last[reused] -= 1
    buffers = tuple(
        Buffer(node, first, last[node], _unread_bytes(node) if _is_tuple(node) else nbytes(node))
        for node, first in step.items()
        if last[node] >= first
    )
    read_at: dict[fx.Node, list[int]] = {}
    for node in stored:
        for source in reads[node]:
            read_at.setdefault(source, []).append(step[node])
    return Timeline(tuple(stored), buffers, tuple(node_workspace(node, images_last) for node in stored), read_at)


def _overwrites(node: fx.Node) -> bool:
    """Whether the operation's output may take the place of an input that dies with it."""
    return is_elementwise(node) or "scatter" in str(node.target) or "index_put" in str(node.target)


def _reusable(
    node: fx.Node,
    sources: tuple[fx.Node, ...],
    step: dict[fx.Node, int],
    last: dict[fx.Node, int],
    returned: set[fx.Node],
) -> fx.Node | None:
    """A buffer of the node's size that dies where the node is computed: it is overwritten in place."""
    for source in sources:
        if source in step and source not in returned and last[source] == step[node] and nbytes(source) == nbytes(node):
            return source
    return None


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


def _unread_bytes(node: fx.Node) -> int:
    """Bytes of the elements of a tuple that nothing picks: they die with the call."""
    picked = {user.args[1] for user in node.users if is_view(user)}
    return sum(
        value.numel() * value.element_size()
        for place, value in enumerate(node.meta["val"])
        if place not in picked and hasattr(value, "element_size")
    )
