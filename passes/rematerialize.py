"""Find, for a residual, the producers from which the backward can replay it.

A chain is the part of the forward between the residual and values that the backward has anyway: other residuals,
parameters and inputs, and statistics so small that saving them costs nothing. It consists of loops that Inductor fuses
(normalisation's affine map, activations, additions, concatenation, padding, resampling), never of random draws. A chain
with a convolution or a product of matrices in it, or a few, is a *rerun*, which takes their time.

Replayed from an exact source the residual is exact. From a source held approximately it stays unbiased when the chain
is *affine* in it: comparisons, and ReLU's, are then taken from bit masks of the true values instead of being
replayed, so that `relu(x)` becomes `where(mask, 0, x)`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from xconv_fx import hooks
from xconv_fx.device.workspace import node_workspace

from .graph import is_elementwise, is_primal, is_view, nbytes, numel, tensor_of
from .op_table import has
from .step_time import node_flops

aten = torch.ops.aten

# Longest chain that is replayed, in operations, and how many of them are run as kernels of a library; and the largest
# value saved for it besides residuals, as a fraction.
LONGEST = 48
MOST_RERUN = 4
# The same of a block that is replayed at once.
LONGEST_BLOCK = 192
MOST_RERUN_IN_BLOCK = 6
SMALL = 1 / 64


@dataclass(frozen=True)
class RecomputeSubgraph:
    """How to replay one residual.

    `nodes` are forward nodes in order, the residual last. `sources` are the other residuals it reads, by name, and
    `extras` the parameters and small values to save for it. `masks` are the booleans to hold when a source is
    approximate, keyed by the node of the chain that they decide (a comparison, or a ReLU); None when the chain is not
    affine in its sources.
    """

    nodes: tuple[fx.Node, ...]
    sources: tuple[str, ...]
    extras: tuple[fx.Node, ...]
    masks: tuple[fx.Node, ...] | None

    @property
    def extra_bytes(self) -> int:
        return sum(nbytes(node) for node in self.extras if not is_primal(node))

    @property
    def rerun(self) -> tuple[fx.Node, ...]:
        """The convolutions and products of the chain, in order."""
        return tuple(filter(_is_rerun, self.nodes))

    @property
    def reruns(self) -> bool:
        """Whether there are any."""
        return bool(self.rerun)

    @property
    def between(self) -> int:
        """Bytes of what is made on the way to the last of them, or behind it."""
        return sum(nbytes(node) for node in self.rerun if node is not self.nodes[-1])

    @functools.cached_property
    def scratch(self) -> int:
        """The most bytes that a library allocates while one of them runs."""
        return max(map(node_workspace, self.rerun), default=0)

    @property
    def flops(self) -> int:
        return sum(map(node_flops, self.rerun))

    @property
    def traffic(self) -> int:
        """Bytes read and written when the chain is one fused kernel, and its reruns are one each."""
        return nbytes(self.nodes[-1]) + 2 * self.between + sum(nbytes(node) for node in self.inputs)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        inside = set(self.nodes)
        return tuple(dict.fromkeys(a for n in self.nodes for a in n.all_input_nodes if a not in inside))


def find_recompute_subgraph(
    node: fx.Node, saved: set[str], longest: int = LONGEST, most_rerun: int = MOST_RERUN
) -> RecomputeSubgraph | None:
    """The chain that replays the forward node `node` from values named in `saved`, or None if there is none."""
    limit = max(1, int(numel(node) * SMALL))
    nodes: list[fx.Node] = []
    sources: dict[str, None] = {}
    extras: dict[fx.Node, None] = {}
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if len(nodes) >= longest or not _replayable(current):
            return None
        nodes.append(current)
        for arg in current.all_input_nodes:
            if arg in seen:
                continue
            seen.add(arg)
            # A saved comparison is made again with its neighbours, or read from bits: it stands for no value.
            held = arg.name in saved and not has(arg, "comparison")
            if held and not is_primal(arg) and numel(arg) > limit:
                sources[arg.name] = None
            elif is_primal(arg) or (numel(arg) <= limit and tensor_of(arg) is not None and not _constant(arg)):
                extras[arg] = None
            else:
                stack.append(arg)
    if sum(map(_is_rerun, nodes)) > most_rerun:
        return None
    nodes.sort()
    return RecomputeSubgraph(tuple(nodes), tuple(sorted(sources)), tuple(extras), _masks(nodes, set(sources)))


def find_block(chain: RecomputeSubgraph, saved: Mapping[str, fx.Node]) -> RecomputeSubgraph | None:
    """The chain that replays what `chain` does of several sources from the one value that all of these come from.

    So the sum behind a residual block is made of the block's input: values inside of the block are made in passing, and
    can be made again later for their own readers. `saved` are the forward's nodes by name. None where the value has one
    source alone, or where no such block of a reasonable size ends at it.
    """
    if len(chain.sources) < 2:
        return None
    node, found = chain.nodes[-1], chain
    left = set(saved) - {node.name}
    while len(found.sources) > 1:
        left.discard(max(saved[name] for name in found.sources).name)
        longer = find_recompute_subgraph(node, left, LONGEST_BLOCK, MOST_RERUN_IN_BLOCK)
        if longer is None:
            return None
        found = longer
    return found if found.sources and found.reruns else None


def _is_rerun(node: fx.Node) -> bool:
    return node.target is aten.convolution.default or has(node, "product")


def _replayable(node: fx.Node) -> bool:
    if node.op != "call_function" or hooks.draws(node) or any(map(hooks.changes, node.all_input_nodes)):
        return False  # Another draw, or of an input that is another one by then.
    if node.target is aten.as_strided.default and not is_primal(node.all_input_nodes[0]):
        return False  # A copy of its source may lie in memory in another way.
    return is_view(node) or is_elementwise(node) or has(node, "replayable") or _is_rerun(node)


def _constant(node: fx.Node) -> bool:
    """Created from nothing (full, iota): cheaper to make again than to save."""
    return not node.all_input_nodes and node.op == "call_function"


def _masks(nodes: list[fx.Node], sources: set[str]) -> tuple[fx.Node, ...] | None:
    """The nodes whose booleans make the chain affine in its sources, or None where nothing does."""
    dependent: set[fx.Node] = set()
    masks: list[fx.Node] = []
    for node in nodes:
        inputs = [arg for arg in node.all_input_nodes if arg in dependent or arg.name in sources]
        if not inputs:
            continue
        if has(node, "comparison"):
            masks.append(node)
            continue
        if not (is_view(node) or _affine(node, inputs)):
            return None
        if node.target is aten.relu.default:
            masks.append(node)
        dependent.add(node)
    return tuple(masks)


def _affine(node: fx.Node, inputs: list[fx.Node]) -> bool:
    if node.target is aten.mul.Tensor:
        return len([arg for arg in node.args if arg in inputs]) == 1
    if node.target is aten.div.Tensor:
        return node.args[1] not in inputs
    return has(node, "affine") and not (node.target is aten.where.self and node.args[0] in inputs)
