"""What layers of `torch.nn` keep to themselves: their tensors, hooks and kinds, and how convolutions compute.

Private parts of PyTorch, read in torch 2.12 to 2.15: `torch/nn/modules/module.py`, `conv.py`, `batchnorm.py` and
`instancenorm.py`, and what `torch.compile` wraps a module in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

CONVOLUTION = nn.modules.conv._ConvNd
TRANSPOSED_CONVOLUTION = nn.modules.conv._ConvTransposeNd
BATCH_NORM = nn.modules.batchnorm._BatchNorm
INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm


def values_of(layer: nn.Module) -> Iterator[Any]:
    """The layer's own parameters and buffers, which may be None, and all its attributes."""
    yield from (*layer._parameters.values(), *layer._buffers.values(), *vars(layer).values())


def put_buffer(layer: nn.Module, name: str, value: Tensor) -> None:
    """Put this very tensor into the place of a buffer."""
    layer._buffers[name] = value


def has_hooks(layer: nn.Module) -> bool:
    """Whether a call of the layer runs anything besides its `forward`."""
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))


def uncompiled(model: Any) -> Any:
    """The module that `torch.compile` was given; any other object as it is."""
    return getattr(model, "_orig_mod", model)


def convolved(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a convolution gives with this weight and bias in the place of its own."""
    result: Tensor = layer._conv_forward(x, weight, bias)
    return result


def padding_for(layer: Any) -> list[int]:
    """What `torch.nn.functional.pad` is given for a convolution that does not pad with zeros."""
    padding: list[int] = layer._reversed_padding_repeated_twice
    return padding


def padding_of_output(layer: Any, x: Tensor, size: Sequence[int] | None) -> list[int]:
    """What a transposed convolution adds to its output, to be of this `size` if one is asked for."""
    geometry = (layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size), layer.dilation)
    added: list[int] = layer._output_padding(x, size, *geometry)
    return added
