"""Partition the joint graph with PyTorch's own partitioner, and pair up what crosses from forward to backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from xconv_fx import hooks
from xconv_fx.errors import UnsupportedModelError

from .graph import is_primal, is_tangent, output_node, storage_root, tensor_of


@dataclass
class Pair:
    """A forward and a backward graph. The forward returns `results` values to the caller, then what it saves.

    The backward's placeholders that are no tangents stand for the saved values, in their order. `restored` are values
    of the forward that the backward makes of others that are saved: their names, and its nodes.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    results: int
    restored: dict[str, fx.Node] = field(default_factory=dict)

    def copy(self) -> tuple[Pair, dict[fx.Node, fx.Node]]:
        """Graphs of its own on the same values, and the node of the copy for every node of this one."""
        nodes: dict[fx.Node, fx.Node] = {}
        forward, backward = (_copied(half, nodes) for half in (self.forward, self.backward))
        restored = {name: nodes[node] for name, node in self.restored.items()}
        return Pair(forward, backward, self.results, restored), nodes

    def verify(self) -> None:
        """Raise `AssertionError` unless each value that is saved has exactly one placeholder, of the same kind and in
        the same order."""
        for saved, placeholder in self.saved().values():
            one, other = tensor_of(saved), tensor_of(placeholder)
            if one is not None and other is not None:
                assert (one.shape, one.dtype) == (other.shape, other.dtype), saved.name

    def saved(self) -> dict[str, tuple[fx.Node, fx.Node]]:
        """Name of a saved value to (node that the forward returns, placeholder of the backward), in order.

        Raises `UnsupportedModelError` for a backward that takes anything else.
        """
        outputs = output_node(self.forward.graph).args[0]
        assert isinstance(outputs, (list, tuple))
        crossing = [node for node in outputs[self.results :] if isinstance(node, fx.Node)]
        placeholders = [node for node in self.backward.graph.find_nodes(op="placeholder") if not is_tangent(node)]
        if len(crossing) != len(placeholders):
            reason = "its backward takes values that its forward does not save"
            raise UnsupportedModelError("the model", reason, "checkpoints without preserve_rng_state, or no budget")
        return {node.name: (node, placeholder) for node, placeholder in zip(crossing, placeholders, strict=True)}

    def residuals(self) -> dict[str, tuple[fx.Node, fx.Node]]:
        """The saved values that memory is spent on: parameters, inputs and results are alive anyway."""
        outputs = output_node(self.forward.graph).args[0]
        assert isinstance(outputs, (list, tuple))
        results = {storage_root(node) for node in outputs[: self.results] if isinstance(node, fx.Node)}
        return {
            name: pair
            for name, pair in self.saved().items()
            if not is_primal(storage_root(pair[0])) and storage_root(pair[0]) not in results
        }

    def add_saved(self, node: fx.Node, name: str) -> fx.Node:
        """Save one more value of the forward: the backward's new placeholder for it."""
        output = output_node(self.forward.graph)
        values = list(output.args[0])  # type: ignore[arg-type]
        values.insert(self.results, node)
        self._return(output, values)
        first = next(iter(self.backward.graph.nodes))
        with self.backward.graph.inserting_before(first):
            placeholder = self.backward.graph.placeholder(name)
        placeholder.target = placeholder.name  # a name of its own: the graph made it unique
        placeholder.meta = dict(node.meta)
        return placeholder

    def remove_saved(self, node: fx.Node, placeholder: fx.Node) -> None:
        """Stop saving a value that no operation of the backward reads any more."""
        output = output_node(self.forward.graph)
        values = list(output.args[0])  # type: ignore[arg-type]
        del values[values.index(node, self.results)]
        self._return(output, values)
        self.backward.graph.erase_node(placeholder)

    def _return(self, output: fx.Node, values: list[fx.Node]) -> None:
        """Set what the forward returns, with a stack trace for each value, and a descriptor for each that is saved."""
        output.args = (tuple(values),)
        if "output_stack_traces" in output.meta:  # One for each value: partitions of CUDA graphs look theirs up.
            traces = [node.meta.get("stack_trace") if isinstance(node, fx.Node) else None for node in values]
            output.meta["output_stack_traces"] = traces
        described = output.meta.get("desc")
        if described is not None:
            saved = range(len(values) - self.results)
            output.meta["desc"] = [*described[: self.results], *(hooks.saved_descriptor(i) for i in saved)]


def _copied(half: fx.GraphModule, nodes: dict[fx.Node, fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    results = graph.graph_copy(half.graph, nodes)
    output = output_node(half.graph)
    made = graph.output(results)
    made.meta = dict(output.meta)
    nodes[output] = made
    copy = hooks.graph_module(half, graph)
    copy.meta = dict(half.meta)
    return copy


def partition(gm: fx.GraphModule, joint_inputs: Sequence[object], saved: float = 1.0, **arguments: Any) -> Pair:
    """The pair that PyTorch's min-cut partitioner chooses for the joint graph, if it may save this share of it."""
    forward, backward = hooks.partition(gm, joint_inputs, arguments, saved)
    return Pair(forward, backward, arguments["num_fwd_outputs"])


def hoist(graph: fx.Graph) -> None:
    """Compute what the backward alone reads as soon as the forward can.

    A value that autograd asked for in the backward (the comparison behind ReLU's mask) stands at the end of the joint
    graph. Saved by the forward it would be computed there, and keep what it reads alive until then.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.meta.get("partitioner_tag") == "is_backward" and node.all_input_nodes:
            latest = max(node.all_input_nodes)
            if latest.op == "placeholder":
                continue
            latest.append(node)
