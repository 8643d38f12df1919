"""Draw the small random numbers of a step once, for the whole batch, before its slices run.

Stochastic depth draws one number a sample, other models one for the batch, from no value of the model. Drawn in front
of the slices and handed to them as one more input, they are the very numbers that the whole batch at once would draw,
and the generator is left where that would leave it. Draws of the size of activations, as in dropout, stay in the
slices.

Works on the graph that Dynamo traced for the batch. Known gap: what is drawn under conditions, or in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from xconv_fx.hooks import dispatch

# The largest value that is drawn early, in bytes a sample.
LARGEST = 1024

_DRAWS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_",
    "normal", "normal_", "uniform_", "exponential_", "random_", "log_normal_", "geometric_", "cauchy_", "poisson",
    "multinomial", "dropout",
}  # fmt: skip
# What draws only for a value that it is given: parts of the names.
_DRAWING = ("dropout", "rrelu", "fractional_max_pool", "scaled_dot_product_attention", "gumbel_softmax")
_NEW: dict[str, Callable[..., Any]] = {
    "new_empty": torch.empty,
    "new_zeros": torch.zeros,
    "new_ones": torch.ones,
    "new_full": torch.full,
}


@dataclass(frozen=True)
class EarlyDraws:
    """A graph without inputs that draws, the nodes of Dynamo's graph whose values it gives, and all that it runs."""

    graph: fx.GraphModule
    nodes: tuple[fx.Node, ...]
    drawn: tuple[fx.Node, ...]


def name_of(node: fx.Node) -> str:
    """What a node of Dynamo's graph calls: a method's or a function's own name."""
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) or dispatch.name_of(node.target)


def draws_any(gm: fx.GraphModule) -> bool:
    """Whether anything in a Dynamo graph may draw."""
    names = [name_of(node) for node in gm.graph.nodes if node.op in ("call_function", "call_method")]
    return any(name in _DRAWS or any(part in name for part in _DRAWING) for name in names)


def find_early_draws(gm: fx.GraphModule, batch: int) -> EarlyDraws | None:
    """The small draws of a Dynamo graph for `batch` samples that depend on nothing else; None where there are none."""
    made: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        called = node.op in ("call_function", "call_method")
        if called and (name_of(node) in _NEW or all(arg in made for arg in node.all_input_nodes)):
            made[node] = None
    parts = [part for part in _connected(made) if any(name_of(node) in _DRAWS for node in part)]
    chosen = {node for part in parts if _is_early(part, batch) for node in part}
    given = [node for node in gm.graph.nodes if node in chosen and _leaves(node, chosen)]
    if not given:
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in chosen:
            copies[node] = _copied(graph, node, copies)
    graph.output(tuple(copies[node] for node in given))
    return EarlyDraws(fx.GraphModule({}, graph), tuple(given), tuple(copies))


def _copied(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node in a graph of its own; what takes only its dtype and device from another value is told them."""
    if name_of(node) not in _NEW:
        return graph.node_copy(node, lambda old: copies[old])
    value: Tensor = node.meta["example_value"]
    fill = node.args[2:] if name_of(node) == "new_full" else ()
    kinds: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    return graph.call_function(_NEW[name_of(node)], (tuple(map(int, value.shape)), *fill), kinds)


def take_early_draws(gm: fx.GraphModule, draws: EarlyDraws, values: list[Tensor]) -> None:
    """Make the draws inputs of the graph, behind those that it has; `values` are fake tensors of their sizes."""
    last = gm.graph.find_nodes(op="placeholder")[-1]
    for index, (node, value) in enumerate(zip(draws.nodes, values, strict=True)):
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"early_draw_{index}")
        last.meta["example_value"] = value
        node.replace_all_uses_with(last)
    for node in reversed(draws.drawn):
        gm.graph.erase_node(node)
    gm.recompile()


def _connected(nodes: Collection[fx.Node]) -> list[set[fx.Node]]:
    """The nodes, those that read each other together."""
    parts: list[set[fx.Node]] = []
    for node in nodes:
        touched = [part for part in parts if not part.isdisjoint(node.all_input_nodes)]
        parts = [part for part in parts if part not in touched]
        parts.append({node}.union(*touched))
    return parts


def _leaves(node: fx.Node, chosen: Collection[fx.Node]) -> bool:
    return any(user not in chosen for user in node.users)


def _is_early(part: set[fx.Node], batch: int) -> bool:
    """Whether these nodes may run first: they give small tensors, which nothing changes after their first use."""
    given = [node for node in part if _leaves(node, part)]
    values = [node.meta.get("example_value") for node in given]
    if not all(isinstance(v, Tensor) and v.numel() * v.element_size() <= LARGEST * batch for v in values):
        return False
    used = [user for node in given for user in node.users if user not in part]
    if not used:
        return False
    first = min(used)
    written = [node for node in part if name_of(node).endswith("_") and not first > node]
    return not written and not any(name_of(user).endswith("_") and user.args and user.args[0] in part for user in used)
