"""Layers for training in little memory without compiling: drop-in replacements of those of `torch.nn`.

`XConv1d/2d/3d`, `XConvTranspose1d/2d/3d` and `XLinear` hold a sketch of their input between forward and backward, in
place of the input: random sums of it (XConv, arXiv 2106.06998), the values in few bits (ActNN, ICML 2021), or such
sums in few bits. Their results and their input and bias gradients are exact, their weight gradients unbiased. `BitReLU`
holds one bit an element, and is exact. They run the compiler's codecs (`ops/sketched_layers.py`, `ops/masked_relu.py`).

Each is a subclass of the layer that it replaces, with the same constructor and the same state dict. Sketching layers
take four more keyword arguments, those of `sketch.Sketch.of`; they are attributes that may be set between steps:

* `probes`: random sums a sample, at most one a value; None holds every value.
* `kind`: "fold" (one pass over the input, the least noise), "gaussian", "rademacher" or "orthogonal" as in the paper.
* `bits`: 32, or 16, 8, 4, 2 or 1 bits for each sum, or value, rounded at random.
* `means`: hold the mean of every channel exactly, and sum deviations from it; None: where the compiler would.

With neither `probes` nor `bits` below 32, and in evaluation mode, a layer is the one that it replaces. Seeds come from
torch's generator, one a forward, so that `torch.manual_seed` and `torch.utils.checkpoint` repeat them.

Layers with equal settings that read the same tensor in one forward hold one sketch of it, as a residual block's first
convolution and its shortcut: one payload, and the draws of the first of them. So it is in eager code, in `torch.fx`
graphs and under any compiler; `ops/sketch_sharing.py` says what counts as the same.

Memory is saved only where nothing else holds the input. PyTorch's own ReLU, pooling, dropout and normalisation layers
hold what they return or read; `BitReLU` is for the first of them.

Known gaps: not twice differentiable, except for `BitReLU`. Codecs run as eager code, several kernels each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xconv_fx.hooks.modules import padding_for, padding_of_output
from xconv_fx.ops import masked_relu, sketched_layers  # noqa: F401 (define the operators)

from .sketch import PLAIN_BITS, Sketch

ops = torch.ops.xconv

# What `BitReLU` holds.
RELU_HOLDS = Sketch.of(bits=1)


class Sketching(nn.Module):
    """What the layers have in common that hold a sketch of their input. A mixin; see the module for the arguments."""

    probes: int | None
    kind: str
    bits: int
    means: bool | None

    def __init__(
        self,
        *args: Any,
        probes: int | None = None,
        kind: str = "fold",
        bits: int = PLAIN_BITS,
        means: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sketch = Sketch.parse(probes, kind, bits, means)

    @property
    def sketch(self) -> Sketch:
        """The four settings as one value."""
        return Sketch.of(self.probes, self.kind, self.bits, self.means)

    @sketch.setter
    def sketch(self, sketch: Sketch) -> None:
        self.probes, self.kind, self.bits, self.means = sketch.settings

    @property
    def is_plain(self) -> bool:
        """Whether the layer is now the one that it replaces: in evaluation mode, or without anything to save."""
        return not self.training or self.sketch.plain

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's result with this weight and bias, holding a sketch of `input` for the backward."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        changed = {"probes": (self.probes, None), "kind": (self.kind, "fold"), "bits": (self.bits, PLAIN_BITS),
                   "means": (self.means, None)}  # fmt: skip
        ours = [f"{name}={value!r}" for name, (value, default) in changed.items() if value != default]
        return ", ".join([super().extra_repr(), *ours])


class _Convolution(Sketching):
    """A convolution from its input to its output."""

    def forward(self, input: Tensor) -> Tensor:
        if self.is_plain:
            return super().forward(input)
        return self.compute(input, self.weight, self.bias)  # type: ignore[arg-type]

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer: Any = self
        padding = layer.padding
        if layer.padding_mode != "zeros":
            input = F.pad(input, padding_for(layer), mode=layer.padding_mode)
            padding = 0
        geometry = (layer.stride, padding, layer.dilation, layer.groups)
        return convolution(input, weight, bias, layer.kernel_size, *geometry, self.sketch)


class _Transposed(Sketching):
    """A transposed convolution."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.is_plain:
            return super().forward(input, output_size)
        return self.compute(input, self.weight, self.bias, output_size)  # type: ignore[arg-type]

    def compute(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
    ) -> Tensor:
        layer: Any = self
        added = padding_of_output(layer, input, output_size)
        return ops.convolution(
            input, weight, bias, layer.stride, layer.padding, layer.dilation, True, added, layer.groups,
            *self.sketch.recipe,
        )  # fmt: skip


class XConv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` that holds a sketch of its input."""


class XConv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` that holds a sketch of its input."""


class XConv3d(_Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` that holds a sketch of its input."""


class XConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` that holds a sketch of its input."""


class XConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` that holds a sketch of its input."""


class XConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` that holds a sketch of its input."""


class XLinear(Sketching, nn.Linear):
    """`torch.nn.Linear` that holds a sketch of its input, whose dim 0 counts the samples."""

    def forward(self, input: Tensor) -> Tensor:
        if self.is_plain:
            return super().forward(input)
        return self.compute(input, self.weight, self.bias)

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(input, weight, bias, *self.sketch.recipe)


class BitReLU(nn.ReLU):
    """`torch.nn.ReLU` that holds one bit an element between forward and backward. Exact.

    With `inplace` the input is overwritten as well, at the price of one more pass over it.
    """

    def forward(self, input: Tensor) -> Tensor:
        return rectify(input, self.inplace)


def rectify(x: Tensor, inplace: bool = False) -> Tensor:
    """ReLU that holds one bit an element; `inplace` overwrites `x` with the result."""
    out = ops.relu(x)
    return x.copy_(out) if inplace else out


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    sketch: Sketch,
) -> Tensor:
    """`torch.nn.functional.conv1d`, `2d` or `3d` that holds a sketch of `x`; as many dims as `kernel_size` has.

    `padding` may be "same" or "valid": an even kernel then needs one more row at the far end, which is padded before.
    """
    dims = len(kernel_size)
    stride, dilation = per_dim(stride, dims), per_dim(dilation, dims)
    if isinstance(padding, str):
        rows = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel_size, dilation, strict=True)]
        if any(row % 2 for row in rows):
            x = F.pad(x, [pad for row in reversed(rows) for pad in (0, row % 2)])
        padding = [row // 2 for row in rows]
    padding = per_dim(padding, dims)
    return ops.convolution(x, weight, bias, stride, padding, dilation, False, [0] * dims, groups, *sketch.recipe)


def per_dim(value: int | Sequence[int], dims: int) -> list[int]:
    """A number for every dim; one number stands for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
