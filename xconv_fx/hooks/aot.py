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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

# The smallest share that the partitioner can be asked to save: at 0 it takes the graph's inputs and looks at no pin.
_LEAST = 1e-6
# How far from the backward the partitioner says that a value is which the backward does not read.
_NEVER_READ = int(1e9)


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
    keep_changed_inputs(gm.graph)
    # A share of the user's own stands where nothing else is asked for.
    share = saved if saved < 1 else functorch_config.activation_memory_budget
    budget = functorch_config.patch(activation_memory_budget=max(share, _LEAST))
    with budget, _draws_apart(gm.graph), _results_for_tuples():
        return min_cut_rematerialization_partition(gm, joint_inputs, **arguments)


def recomputing(share: float) -> contextlib.AbstractContextManager[None]:
    """What Inductor compiles meanwhile saves this share of the residuals' bytes (`activation_memory_budget`)."""
    import torch._functorch.config as functorch_config

    return functorch_config.patch(activation_memory_budget=share)  # type: ignore[no-any-return]


def pin_draws(graph: fx.Graph) -> None:
    """Mark every draw as a value that the forward saves, but in what the user checkpoints."""
    for node in graph.nodes:
        if draws(node) and "ac_graph_id" not in node.meta:
            for value in (node, *_results(node)):
                value.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _results(node: fx.Node) -> tuple[fx.Node, ...]:
    """The single results of an operator that has several; none of one that has not."""
    return tuple(node.users) if isinstance(node.meta.get("val"), (tuple, list)) else ()


@contextlib.contextmanager
def _results_for_tuples() -> Iterator[None]:
    """While active, torch's partitioner saves what the backward may read of an operator with several results.

    It takes one that is marked for a value to be saved, which a tuple cannot be; of single results it heeds no mark.
    """
    from torch._functorch import partitioners

    choose = partitioners.choose_saved_values_set

    def chosen(*arguments: Any, **options: Any) -> list[fx.Node]:
        saved = choose(*arguments, **options)
        single = (value for node in saved for value in (_results(node) or (node,)))
        return list(
            dict.fromkeys(
                value for value in single if value in saved or getattr(value, "dist_from_bw", 0) < _NEVER_READ
            )
        )

    with mock.patch.object(partitioners, "choose_saved_values_set", chosen):
        yield


def keep_changed_inputs(graph: fx.Graph) -> None:
    """Let the backward read what the forward found in the inputs that it changes in place, and not what it left there.

    torch's partitioner takes an input for a value that is there in the backward as well. What reads one that changes is
    marked to be saved, and the backward gets a copy of the input where it reads the input itself.
    """
    late = _closure(node for node in graph.nodes if node.op == "placeholder" and "tangents" in str(node.target))
    for root in {copy.args[0] for copy in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)}:
        same = [root] if root.op == "placeholder" else []
        for node in same:
            readers = [user for user in node.users if user.op == "call_function" and not _writes(user, node)]
            same += [user for user in readers if _is_view(user)]
            for user in readers:
                if user not in late and not _is_view(user):
                    user.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            if any(user in late for user in readers):
                # The forward reads it too: what the backward alone reads is made there.
                _read_copy(graph, node, [user for user in readers if not _is_view(user)])


def changes(node: fx.Node) -> bool:
    """Whether a graph's input is one that the graph changes in place."""
    return node.op == "placeholder" and any(_writes(user, node) for user in node.users)


def _writes(user: fx.Node, node: fx.Node) -> bool:
    return user.target is torch.ops.aten.copy_.default and user.args[0] is node


def _read_copy(graph: fx.Graph, node: fx.Node, readers: Sequence[fx.Node]) -> None:
    with graph.inserting_after(node):
        copied = graph.call_function(torch.ops.aten.clone.default, (node,))
    value = node.meta["val"]
    with torch._guards.detect_fake_mode([value]) or contextlib.nullcontext():
        copied.meta = {**node.meta, "val": value.clone(), "recompute": CheckpointPolicy.MUST_SAVE}
    copied.meta.pop("desc", None)
    for reader in readers:
        reader.replace_input_with(node, copied)


def _closure(roots: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.users
    return found


def _is_view(node: fx.Node) -> bool:
    """Whether the result shares memory with the first operand."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.arguments:
        return False
    alias = node.target._schema.arguments[0].alias_info
    return alias is not None and not alias.is_write


@contextlib.contextmanager
def _draws_apart(graph: fx.Graph) -> Iterator[None]:
    """While active, calls of operators that draw are never taken for common subexpressions."""
    from torch._functorch import compile_utils

    known = [node.target.overloadpacket for node in graph.nodes if draws(node)]  # type: ignore[union-attr]
    with mock.patch.object(compile_utils, "rand_ops", [*compile_utils.rand_ops, *known]):
        yield


class ChangedElsewhere(Exception):
    """A change of an input that the compiled graph does not make itself."""


def changed_inputs(joint: fx.Graph, results: int) -> dict[fx.Node, fx.Node]:
    """The inputs that a joint graph changes in place, and their new values.

    Raises `ChangedElsewhere` for changes that AOTAutograd makes outside of the graph, from one of its first `results`
    outputs: those that a gradient flows through, or that change a shape.
    """
    from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput

    output = next(node for node in reversed(joint.nodes) if node.op == "output")
    described: Any = output.meta.get("desc") or ()
    for descriptor in described[:results]:
        if isinstance(descriptor, InputMutationAOTOutput):
            name = descriptor.mutated_input.expr()
            raise ChangedElsewhere(f"the model changes its input {name} in place, in its shape or under autograd")
    copies = joint.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {node.args[0]: node.args[1] for node in copies if node.args[0].op == "placeholder"}
