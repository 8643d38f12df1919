"""ReLU that holds one bit an element, as a dispatcher op with registered autograd. Exact.

`torch.ops.xconv.relu` computes what `aten.relu` computes, and its gradient is that of `aten.relu` bit by bit. PyTorch's
ReLU holds its result, in float32 32 times as much as the signs that its backward reads: in eager code the result is
then alive even if the layer behind it holds only a sketch. This is BReLU of XConv (arXiv 2106.06998).

As in `estimator`, the public op is a composite that packs the mask, and calls `xconv::masked_relu`, which takes it as
an input and owns the autograd formula. No mask is packed where no gradient will be asked for.

Known gap: no `vmap` rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xconv_fx.codec_spec import CodecSpec

from .bitmask import BITMASK
from .codec import SavedAs
from .layout import order_of

aten = torch.ops.aten
ops = torch.ops.xconv


def _held(x: Tensor) -> SavedAs:
    return SavedAs(CodecSpec("bitmask"), tuple(x.shape), torch.bool, order_of(x.shape, x.stride()))


def _relu(x: Tensor) -> Tensor:
    """`aten.relu` that holds the signs of `x` for its backward."""
    if not (torch.is_grad_enabled() and x.requires_grad and x.dim() > 0 and x.numel() > 0):
        return aten.relu.default(x)
    # What ReLU's own backward asks: NaN is not below zero, and its gradient passes.
    dead = x.detach() <= 0
    (words,) = BITMASK.encode(dead, dead, _held(dead))
    return ops.masked_relu(x, words)


@torch.library.custom_op("xconv::masked_relu", mutates_args=())
def _masked_relu(x: Tensor, words: Tensor) -> Tensor:
    return aten.relu.default(x)


@_masked_relu.register_fake
def _(x: Tensor, words: Tensor) -> Tensor:
    return aten.relu.default(x)


def _hold(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, words = inputs
    ctx.save_for_backward(words)
    ctx.held = _held(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (words,) = ctx.saved_tensors
    dead = BITMASK.decode((words,), words, ctx.held)
    return torch.where(dead, 0, grad), None


_masked_relu.register_autograd(_backward, setup_context=_hold)

torch.library.define("xconv::relu", "(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.impl("xconv::relu", "CompositeImplicitAutograd", _relu)
