"""Lay volumes out channels-last, where oneDNN computes their convolutions without copies.

Inductor lays images out channels-last, volumes (N, C, D, H, W) not. oneDNN's 3D convolutions work on channels-last
data: for contiguous ones each call reorders input and output, which takes as much memory again as the two of them, and
about half of the time. So inputs and convolution weights are laid out channels-last at the start of the graph, and
everything between follows; results get the layout that they would have had. Inputs that the model changes in place stay
as they are: the change is the caller's to see, and would be made to the copy.

The weight gradient is the exception: there oneDNN transposes one sample for each thread, so that many threads may need
more memory than with contiguous volumes. The layout is therefore a choice of the strategy's.

ATen draws in the order of memory: where Inductor is told to draw as ATen does, a graph that draws is left as it is.

Works on the graph that Dynamo traced, before autograd sees it. Only for the CPU: on GPUs cuDNN chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from xconv_fx.hooks.autograd import version_of
from xconv_fx.ops import layout

from .early_draws import draws_any
from .graph import first_operation

_CONVOLUTIONS = (
    torch.conv3d,
    torch.conv_transpose3d,
    torch.nn.functional.conv3d,
    torch.nn.functional.conv_transpose3d,
    torch.ops.aten.conv3d.default,
    torch.ops.aten.conv_transpose3d.input,
)


def volumes_channels_last(gm: fx.GraphModule, draws_as_aten: bool = False) -> None:
    """Insert the layout changes into a Dynamo graph with 3D convolutions on the CPU; leave any other as it is."""
    convolutions = volume_convolutions(gm)
    if not convolutions or (draws_as_aten and draws_any(gm)):
        return
    weights = [_operand(node, 1, "weight") for node in convolutions]
    volumes = [node for node in gm.graph.find_nodes(op="placeholder") if node in weights or _is_volume_on_cpu(node)]
    volumes = [node for node in volumes if not _changes(node)]
    first = first_operation(gm.graph)
    for node in volumes:
        with gm.graph.inserting_before(first):
            relaid = gm.graph.call_function(channels_last, (node,))
        relaid.meta = dict(node.meta)
        node.replace_all_uses_with(relaid, delete_user_cb=lambda user, own=relaid: user is not own)
    output = next(node for node in gm.graph.nodes if node.op == "output")
    for result in dict.fromkeys(node for node in output.all_input_nodes if _has_order(node)):
        with gm.graph.inserting_before(output):
            restored = gm.graph.call_function(_as_before, (result, _strides(result)))
        output.replace_input_with(result, restored)
    gm.recompile()


def volume_convolutions(gm: fx.GraphModule) -> list[fx.Node]:
    """The 3D convolutions of a Dynamo graph, if all of them are known to run on the CPU."""
    found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _CONVOLUTIONS]
    return found if all(_is_volume_on_cpu(_operand(node, 0, "input")) for node in found) else []


def channels_last(x: Tensor) -> Tensor:
    """`x` in memory order N, D, H, W, C."""
    return x.contiguous(memory_format=torch.channels_last_3d)


class _AsBefore(torch.autograd.Function):
    """A copy with dimensions in another order in memory, of a volume whose gradient is laid out channels-last.

    Convolutions would otherwise copy the caller's gradient into their layout one by one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: tuple[int, ...]) -> Tensor:
        return layout.to_logical(layout.to_physical(x, order), order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return channels_last(grads[0]) if grads[0].dim() == 5 else grads[0], None


def _as_before(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`x` with the strides that the caller expects."""
    if x.stride() == stride:
        return x
    restored: Tensor = _AsBefore.apply(x, layout.order_of(x.shape, stride))  # type: ignore[no-untyped-call]
    return restored


def _operand(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs[name]


def _value(node: Any) -> Any:
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None


def _is_volume_on_cpu(node: Any) -> bool:
    value = _value(node)
    return isinstance(value, Tensor) and value.dim() == 5 and value.device.type == "cpu" and value.is_floating_point()


def _has_order(node: Any) -> bool:
    """Whether this is a value of three dimensions or more that lies on the CPU without gaps."""
    value = _value(node)
    if not isinstance(value, Tensor) or value.dim() < 3 or value.device.type != "cpu":
        return False
    return layout.dense_order(value.shape, value.stride()) is not None


def _changes(node: fx.Node) -> bool:
    """Whether an input was changed in place, itself or through a view, while the graph was traced."""
    value = _value(node)
    return value is not None and version_of(value) > 0


def _strides(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(stride) for stride in _value(node).stride())
