"""Nodes of a `torch.fx` graph that compute a convolution, a linear layer or a ReLU, and what can stand in their place.

A node is a call of a `torch.nn` layer, of a function of `torch.nn.functional`, or of an ATen operator. Replacements are
written by running the code of the drop-in layers on proxies, which appends their operations to the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.nn import functional as F

from xconv_fx import nn as xnn
from xconv_fx.hooks.dispatch import OpOverload
from xconv_fx.hooks.modules import has_hooks
from xconv_fx.passes.provenance import layer_of

from .convert import SKETCHING
from .sketch import Sketch

aten = torch.ops.aten
ops = torch.ops.xconv

# Appends operations that hold what a sketch says, at the graph's insertion point: the proxy of the result.
Writer = Callable[[Sketch], Any]


@dataclass(frozen=True)
class Site:
    """A node that may be replaced: its layer's name and type, what writes the replacement, and why nothing can."""

    node: fx.Node
    layer: str
    type: str
    write: Writer
    reason: str = ""


def sketching(node: fx.Node, module: fx.GraphModule) -> Site | None:
    """The site of a convolution or a linear layer, None of any other node."""
    if node.op == "call_module":
        return _layer_site(node, module, tuple(SKETCHING), _write_layer)
    function = _function(node)
    if function not in _READ:
        return None

    def read() -> _Operation:
        # Read again when it is replaced: by then its input may have been replaced, too.
        return _READ[function](*node.args, **node.kwargs)

    name, kind = _name(node, read().weight), str(getattr(function, "__name__", function))
    return Site(node, name, kind, lambda sketch: read().write(module, sketch), read().why_not(module))


def rectifier(node: fx.Node, module: fx.GraphModule) -> Site | None:
    """The site of a ReLU, None of any other node."""
    if node.op == "call_module":
        return _layer_site(node, module, (nn.ReLU,), _write_relu)
    function = f"torch.Tensor.{node.target}" if node.op == "call_method" else _function(node)
    if function not in _RELUS:
        return None

    def write(sketch: Sketch) -> Any:
        x, inplace = _read_relu(*node.args, **node.kwargs)
        return xnn.rectify(_proxies(x)[0], inplace or function in _INPLACE_RELUS)

    return Site(node, layer_of(node) or node.name, "relu", write)


def _function(node: fx.Node) -> Any:
    """What is called: for one of an ATen operator's overloads, all of them."""
    target = node.target
    if node.op != "call_function":
        return None
    return target.overloadpacket if isinstance(target, OpOverload) else target


def _name(node: fx.Node, weight: fx.Node) -> str:
    """The name of the layer that a function computes: of its module, else of its weight, else of the node."""
    owner = str(weight.target).removesuffix(".weight") if weight.op == "get_attr" else node.name
    return layer_of(node) or owner


def _proxies(*nodes: Any) -> list[Any]:
    """Proxies that append to the nodes' graph; None stays None."""
    tracer = fx.proxy.GraphAppendingTracer(nodes[0].graph)
    return [None if node is None else fx.Proxy(node, tracer) for node in nodes]


# Calls of layers


def _layer_site(
    node: fx.Node, module: fx.GraphModule, kinds: tuple[type, ...], write: Callable[[fx.Node, Any, Sketch], Any]
) -> Site | None:
    layer, name = module.get_submodule(str(node.target)), str(node.target)
    if not isinstance(layer, kinds):
        return None
    reason = ""
    if type(layer) not in kinds:
        reason = "a class of its own"
    elif has_hooks(layer):
        reason = "it has hooks, which an operation would not run"
    elif len(node.args) > 1 or node.kwargs.keys() - {"input"}:
        reason = "the size of its output is an argument"
    return Site(node, name, type(layer).__name__, lambda sketch: write(node, layer, sketch), reason)


def _write_layer(node: fx.Node, layer: Any, sketch: Sketch) -> Any:
    twin: Any = copy.copy(layer)
    twin.__class__, twin.sketch = SKETCHING[type(layer)], sketch
    weight, bias = (
        None if getattr(layer, name) is None else node.graph.get_attr(f"{node.target}.{name}")
        for name in ("weight", "bias")
    )
    return twin.compute(*_proxies(node.all_input_nodes[0], weight, bias))


def _write_relu(node: fx.Node, layer: Any, sketch: Sketch) -> Any:
    return xnn.rectify(_proxies(node.all_input_nodes[0])[0], layer.inplace)


# Calls of functions: each signature is read by a function that has it


class _Operation(Protocol):
    """A convolution or linear operation by its arguments."""

    weight: fx.Node

    def why_not(self, module: fx.GraphModule) -> str:
        """Why it cannot be replaced, or ""."""

    def write(self, module: fx.GraphModule, sketch: Sketch) -> Any:
        """Append the replacement."""


@dataclass
class _Linear:
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    def why_not(self, module: fx.GraphModule) -> str:
        return ""

    def write(self, module: fx.GraphModule, sketch: Sketch) -> Any:
        return ops.linear(*_proxies(self.x, self.weight, self.bias), *sketch.recipe)


@dataclass
class _Convolution:
    """`dims` are 0 where only the weight tells how many there are."""

    dims: int
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: int | Sequence[int]
    padding: Any
    dilation: int | Sequence[int]
    groups: int
    transposed: bool = False
    output_padding: int | Sequence[int] = 0

    def why_not(self, module: fx.GraphModule) -> str:
        known = self._kernel(module) is not None
        return "" if known else "the size of its kernel is not known in the graph"

    def write(self, module: fx.GraphModule, sketch: Sketch) -> Any:
        x, weight, bias = _proxies(self.x, self.weight, self.bias)
        kernel = self._kernel(module)
        assert kernel is not None
        if not self.transposed:
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            return xnn.convolution(x, weight, bias, kernel, *geometry, sketch)
        lists = (self.stride, self.padding, self.dilation, self.output_padding)
        stride, padding, dilation, added = (xnn.per_dim(value, len(kernel)) for value in lists)
        return ops.convolution(x, weight, bias, stride, padding, dilation, True, added, self.groups, *sketch.recipe)

    def _kernel(self, module: fx.GraphModule) -> list[int] | None:
        """The extents of the kernel; where they are not needed, only as many of them; None where they are unknown."""
        size = _size(self.weight, module)
        if size is not None:
            return size[2:]
        return [1] * self.dims if self.dims and self.padding != "same" else None


def _size(weight: fx.Node, module: fx.GraphModule) -> list[int] | None:
    """The shape of a weight: of a parameter, or of a value that the graph says the shape of."""
    if weight.op == "get_attr":
        path, _, name = str(weight.target).rpartition(".")
        return list(getattr(module.get_submodule(path), name).shape)
    value = weight.meta.get("val")
    return [int(extent) for extent in value.shape] if isinstance(value, torch.Tensor) else None


def _reader(dims: int) -> Callable[..., _Convolution]:
    def read(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # type: ignore[no-untyped-def]
        return _Convolution(dims, input, weight, bias, stride, padding, dilation, groups)

    return read


def _transposed_reader(dims: int) -> Callable[..., _Convolution]:
    def read(  # type: ignore[no-untyped-def]
        input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ):
        return _Convolution(dims, input, weight, bias, stride, padding, dilation, groups, True, output_padding)

    return read


def _read_any(  # type: ignore[no-untyped-def]
    input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
) -> _Convolution:
    return _Convolution(0, input, weight, bias, stride, padding, dilation, groups, transposed, output_padding)


def _read_linear(input, weight, bias=None) -> _Linear:  # type: ignore[no-untyped-def]
    return _Linear(input, weight, bias)


_READ: dict[Any, Callable[..., _Operation]] = {
    **dict.fromkeys((F.linear, aten.linear), _read_linear),
    **dict.fromkeys((torch.convolution, aten.convolution), _read_any),
}
for _dims in (1, 2, 3):
    for _home in (F, aten):
        _READ[getattr(_home, f"conv{_dims}d")] = _reader(_dims)
        _READ[getattr(_home, f"conv_transpose{_dims}d")] = _transposed_reader(_dims)

_INPLACE_RELUS = {torch.relu_, aten.relu_, "torch.Tensor.relu_"}
_RELUS = {F.relu, torch.relu, aten.relu, "torch.Tensor.relu", *_INPLACE_RELUS}


def _read_relu(input, inplace=False) -> tuple[fx.Node, bool]:  # type: ignore[no-untyped-def]
    return input, inplace
