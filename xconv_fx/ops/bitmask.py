"""Booleans held as one bit an element: masks of ReLU, dropout, `where`. Exact.

PyTorch holds a boolean in a byte, so that the mask of a ReLU takes a quarter of its float32 activation. XConv's
BReLU and ActNN's ReLU hold a bit; this is the same for any boolean. See `layout.Packing` for the arrangement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import layout
from .codec import Codec, SavedAs, register


@torch.library.custom_op(
    "xconv::pack_mask",
    mutates_args=(),
    schema="(Tensor mask, int[] order) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def pack_mask(mask: Tensor, order: Sequence[int]) -> Tensor:
    """int32 words that hold the bool `mask`, one bit an element; shape `layout.packing(size, order, 1).words`."""
    plan = _plan(mask, order)
    return layout.pack(layout.to_rows(layout.to_physical(mask, order), plan), plan)


@pack_mask.register_fake
def _(mask: Tensor, order: Sequence[int]) -> Tensor:
    return mask.new_empty(_plan(mask, order).words, dtype=torch.int32)


@torch.library.custom_op(
    "xconv::unpack_mask",
    mutates_args=(),
    schema="(Tensor words, int[] size, int[] order) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def unpack_mask(words: Tensor, size: Sequence[int], order: Sequence[int]) -> Tensor:
    """The bool tensor of shape `size` that `pack_mask` packed, with strides dense in `order`."""
    return layout.to_logical(layout.unpack(words, layout.packing(size, order, 1), torch.bool), order)


@unpack_mask.register_fake
def _(words: Tensor, size: Sequence[int], order: Sequence[int]) -> Tensor:
    return words.new_empty_strided(tuple(size), layout.dense_strides(size, order), dtype=torch.bool)


def _plan(mask: Tensor, order: Sequence[int]) -> layout.Packing:
    if mask.dtype != torch.bool:
        raise ValueError(f"dtype={mask.dtype}: a mask must be torch.bool")
    layout.check_order(mask.shape, order)
    return layout.packing(tuple(mask.shape), order, 1)


def _encode(x: Tensor, seed: Tensor, held: SavedAs) -> tuple[Tensor, ...]:
    return (torch.ops.xconv.pack_mask.default(x, list(held.order)),)


def _decode(payload: tuple[Tensor, ...], seed: Tensor, held: SavedAs) -> Tensor:
    (words,) = payload
    return torch.ops.xconv.unpack_mask.default(words, list(held.size), list(held.order))


def _payload_bytes(held: SavedAs) -> int:
    return layout.packing(held.size, held.order, 1).word_bytes


def _traffic(held: SavedAs) -> int:
    return 2 * (math.prod(held.size) + _payload_bytes(held))


BITMASK = register(
    Codec(
        name="bitmask",
        lossless=True,
        encode=_encode,
        decode=_decode,
        payload_bytes=_payload_bytes,
        noise=lambda held: 0.0,
        traffic=_traffic,
    )
)
