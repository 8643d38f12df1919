"""What Dynamo hands to a backend: on whose behalf, and which of a graph's inputs are what.

Private parts of PyTorch, read in torch 2.13: `torch._TorchCompileWrapper`, `OptimizedModule`, the metadata `grapharg`
of placeholders, and the error of a graph whose scalars are traced anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .frames import callers


def compile_call() -> object | None:
    """The `torch.compile` call on whose behalf a backend is running: one object for all graphs of that call."""
    return next((value for value in callers() if isinstance(value, torch._TorchCompileWrapper)), None)


def compiled_module() -> torch.nn.Module | None:
    """The outermost module that is being compiled, or None (a compiled function)."""
    from torch._dynamo.eval_frame import OptimizedModule

    found = [value._orig_mod for value in callers() if isinstance(value, OptimizedModule)]
    return found[-1] if found else None


def parameter_bytes(gm: fx.GraphModule, buffers: bool = False) -> int:
    """Bytes of the parameters (and buffers) among a Dynamo graph's inputs, counted once each."""
    sizes: dict[int, int] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        tensor = _example(node)
        if isinstance(tensor, torch.nn.Parameter) or (buffers and "buffers" in node.name and tensor is not None):
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def examples(gm: fx.GraphModule) -> list[Any]:
    """What Dynamo traced a graph with: its inputs, as far as they are known."""
    return [_example(node) for node in gm.graph.find_nodes(op="placeholder") if "grapharg" in node.meta]


def _example(node: fx.Node, otherwise: Any = None) -> Any:
    """What Dynamo traced an input with, where it is known."""
    return getattr(node.meta.get("grapharg"), "example", otherwise)


def data_inputs(gm: fx.GraphModule) -> list[bool]:
    """Which of a Dynamo graph's inputs are tensors, but neither parameters nor buffers.

    What one part of a graph that DDPOptimizer cut hands to the next is known by its fake value alone.
    """
    examples = [
        (node, _example(node, node.meta.get("example_value"))) for node in gm.graph.find_nodes(op="placeholder")
    ]
    return [
        isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and "buffers" not in node.name
        for node, value in examples
    ]


def lost_change(gm: fx.GraphModule, error: Exception) -> str | None:
    """The input of a Dynamo graph of which a change in place is lost, if this error of its compilation is why.

    Dynamo takes tensors of float64 without dimensions for numbers of Python, and traces such a graph anew; calls of
    methods that change them have no reader, and are then no part of it any more (torch 2.13).
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    if not isinstance(error, TensorifyScalarRestartAnalysis):
        return None
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.dim() == 0:
            methods = [str(user.target) for user in node.users if user.op == "call_method" and user.args[0] is node]
            if any(method.endswith("_") and not method.endswith("__") for method in methods):
                return node.name
    return None


def branches(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph goes one of two ways by a value that it computes."""
    return bool(gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond))


def without_samples(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether all that a Dynamo graph takes besides parameters and buffers is empty, as a batch of no samples is."""
    data = [value for value, is_data in zip(example_inputs, data_inputs(gm), strict=True) if is_data and value.dim()]
    return bool(data) and all(value.numel() == 0 for value in data)


def needs_backward(example_inputs: Sequence[Any]) -> bool:
    """Whether the graph that Dynamo traced will be differentiated."""
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )


def input_bytes(gm: fx.GraphModule, given: bool = False) -> int:
    """Bytes of a Dynamo graph's inputs that are neither parameters nor buffers.

    With `given`, of those alone that are no results of what is differentiated before the graph.
    """
    found = (node.meta.get("val", node.meta.get("example_value")) for node in gm.graph.find_nodes(op="placeholder"))
    values = [value for value in found if isinstance(value, torch.Tensor)]
    every = sum(value.numel() * value.element_size() for value in values if value.is_leaf or not given)
    return max(0, int(every) - parameter_bytes(gm, buffers=True))
