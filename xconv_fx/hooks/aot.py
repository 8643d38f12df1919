"""AOTAutograd's joint graph: dead and common code out of it, and torch's partition of it into forward and backward.

A random draw is made once, whoever asks for recomputation. torch's partitioner knows three random operators and its
elimination of common code fifteen: below an `activation_memory_budget` of 1 it makes all others again in the backward,
which then multiplies by other numbers than the forward did, and it takes two equal calls of an operator that it does
not know for one draw. Here every operator that torch itself tags as drawing counts. What a user's own
`torch.utils.checkpoint` recomputes is left alone: there torch restores the generator's state.

Checked on torch 2.13.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

# The smallest share that the partitioner can be asked to save: at 0 it takes the graph's inputs and looks at no pin.
_LEAST = 1e-6


def draws(node: fx.Node) -> bool:
    """Whether every call of the node's operator gives other numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = node.normalized_arguments(fx.GraphModule({}, fx.Graph()), normalize_to_only_use_kwargs=True)
    # Attention is tagged for its dropout, which may be none.
    return given is None or given.kwargs.get("dropout_p") != 0.0


def deduplicate(gm: fx.GraphModule) -> None:
    """Dead code and common subexpressions out of a joint graph, as torch's partitioner does it itself."""
    from torch._functorch.compile_utils import fx_graph_cse

    gm.graph.eliminate_dead_code()
    with _draws_apart(gm.graph):
        gm.graph = fx_graph_cse(gm.graph)
    gm.recompile()


def partition(
    gm: fx.GraphModule, joint_inputs: Sequence[object], arguments: dict[str, Any], saved: float
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """torch's min-cut partitioner: the joint graph to (forward, backward).

    `saved` is its `activation_memory_budget`: the share of the residuals' bytes that it may save, and recomputes the
    rest at the least arithmetic; 1 recomputes only what costs next to nothing.
    """
    import torch._functorch.config as functorch_config
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    pin_draws(gm.graph)
    # A share of the user's own stands where nothing else is asked for.
    share = saved if saved < 1 else functorch_config.activation_memory_budget
    with functorch_config.patch(activation_memory_budget=max(share, _LEAST)), _draws_apart(gm.graph):
        return min_cut_rematerialization_partition(gm, joint_inputs, **arguments)


def pin_draws(graph: fx.Graph) -> None:
    """Mark every draw as a value that the forward saves, but in what the user checkpoints."""
    for node in graph.nodes:
        if draws(node) and "ac_graph_id" not in node.meta:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


@contextlib.contextmanager
def _draws_apart(graph: fx.Graph) -> Iterator[None]:
    """While active, calls of operators that draw are never taken for common subexpressions."""
    from torch._functorch import compile_utils

    known = [node.target.overloadpacket for node in graph.nodes if draws(node)]  # type: ignore[union-attr]
    with mock.patch.object(compile_utils, "rand_ops", [*compile_utils.rand_ops, *known]):
        yield
