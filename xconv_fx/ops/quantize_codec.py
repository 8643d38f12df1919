"""The codec "quantize": codes of one width for all values (`quantize`), or of one for each sample (`samples`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import samples
from .codec import Codec, SavedAs, register
from .quantize import bits_of, code_bytes, draws, group_noise


def _encode(x: Tensor, seed: Tensor, held: SavedAs) -> tuple[Tensor, ...]:
    if held.spec.by_sample:
        return samples.encode(x, seed, bits_of(held), list(held.order), held.spec.by_sample == "mixed")
    return tuple(torch.ops.xconv.quantize.default(x, seed, bits_of(held), list(held.order)))


def _decode(payload: tuple[Tensor, ...], seed: Tensor, held: SavedAs) -> Tensor:
    codes, ranges, *widths = payload
    order = list(held.order)
    if held.spec.by_sample:
        return torch.ops.xconv.dequantize_samples.default(codes, ranges, *widths, list(held.size), order, held.dtype)
    return torch.ops.xconv.dequantize.default(codes, ranges, list(held.size), order, bits_of(held), held.dtype)


def _payload_bytes(held: SavedAs) -> int:
    if held.spec.by_sample:
        return samples.payload_bytes(held.size, held.order, bits_of(held), held.dtype)
    return code_bytes(held.size, held.order, bits_of(held), held.dtype)


def _counts(held: SavedAs) -> int:
    if held.spec.by_sample:
        return samples.counts(held.size, held.order)
    return draws(held.size, held.order, bits_of(held))


def _traffic(held: SavedAs) -> int:
    # Two passes over x, one for the ranges and one for the codes, and one to write it back.
    return 3 * math.prod(held.size) * held.dtype.itemsize + 2 * _payload_bytes(held)


QUANTIZE = register(
    Codec(
        name="quantize",
        lossless=False,
        encode=_encode,
        decode=_decode,
        payload_bytes=_payload_bytes,
        noise=lambda held: group_noise(held.size, held.order, bits_of(held)),
        traffic=_traffic,
        seeded=True,
        counts=_counts,
    )
)
