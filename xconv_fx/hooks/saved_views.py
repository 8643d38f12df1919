"""Views of inputs that a forward saves, which must be those inputs to autograd.

Autograd refuses a backward that reads what was written to since. It compares the version counters of what is saved,
and a view that generated code made has one of its own: then a caller who overwrites an input between forward and
backward gets a wrong gradient instead of an error. So such views are made once more, from the input.

Private parts of PyTorch, read in torch 2.13: `ViewAndMutationMeta.num_forward` of
`torch/_functorch/_aot_autograd/schemas.py`, and the calling convention of compiled graphs, which empty the list of
their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx


def views_of_inputs(forward: fx.GraphModule) -> dict[int, int]:
    """Place of each output that is saved and is a view of an input, and the input's place."""
    context = torch._guards.TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is None:
        return {}
    inputs = {node: place for place, node in enumerate(forward.graph.find_nodes(op="placeholder"))}
    outputs: Any = forward.graph.output_node().args[0]
    found = {}
    for place, node in enumerate(outputs):
        if place >= metadata.num_forward and isinstance(node, fx.Node) and node not in inputs:
            *_, root = _bases(node)
            if root in inputs:
                found[place] = inputs[root]
    return found


def with_versions(forward: Callable[[list[Any]], Any], views: dict[int, int]) -> Callable[[list[Any]], Any]:
    """A compiled forward whose outputs at these places share the version counters of the inputs."""

    def run(arguments: list[Any]) -> Any:
        inputs = {place: arguments[source] for place, source in views.items()}
        outputs = list(forward(arguments))
        for place, source in inputs.items():
            outputs[place] = _of(source, outputs[place])
        return outputs

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _of(source: Tensor, view: Tensor) -> Tensor:
    """The same view, made of `source`; as it is where it is a copy, or has the memory mean something else."""
    if view.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
        return view
    if (view.dtype, view.is_conj(), view.is_neg()) != (source.dtype, source.is_conj(), source.is_neg()):
        return view
    return source.detach().as_strided(view.shape, view.stride(), view.storage_offset())


def _bases(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and what it is a view of, and that, and so on."""
    while True:
        yield node
        schema = getattr(node.target, "_schema", None)
        viewed = schema is not None and schema.arguments and schema.arguments[0].alias_info is not None
        if node.op != "call_function" or not viewed or not node.args or not isinstance(node.args[0], fx.Node):
            return
        node = node.args[0]
