"""The entries of dense probes on a GPU, in one launch a block: a Triton kernel of ours.

As plain operations a block of `dense.Probes` takes some forty launches, and twice that for normal entries. The kernel
computes the same function of the seed, the feature and the column: signs are the same bits, normal entries the same to
rounding of logarithm and cosine.

Known gap: where Triton is not installed (a wheel of torch for CUDA brings it on Linux), entries are plain operations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .triton_words import launched_on, tl, triton

if triton is not None:
    from .triton_words import FIRST, SECOND, constants, halves, keyed_product

# Entries of a block of threads: of so many columns at most.
_ENTRIES, _COLUMNS = 1024, 64


if triton is not None:
    _TAU = tl.constexpr(2 * math.pi)

    @triton.jit
    def _mix_signed(word):
        """The same with shifts that draw the sign along: `dense` derives its keys in int32."""
        word = (word ^ (word.to(tl.int32, bitcast=True) >> 16).to(tl.uint32, bitcast=True)) * tl.full(
            (), FIRST, tl.uint32
        )
        word = (word ^ (word.to(tl.int32, bitcast=True) >> 15).to(tl.uint32, bitcast=True)) * tl.full(
            (), SECOND, tl.uint32
        )
        return word ^ (word.to(tl.int32, bitcast=True) >> 16).to(tl.uint32, bitcast=True)

    @triton.jit
    def _uniform(feature, low, high, stream):
        """`counter_rng.uniform` of the hash of each feature, and the hash, under the keys of each stream."""
        apart, second = constants(stream)
        one, other = _mix_signed(low ^ apart), _mix_signed(high ^ second)
        word = keyed_product(feature, _mix_signed(one ^ other), _mix_signed(one + other))
        word = word ^ (word >> 16)
        return (word >> 8).to(tl.float32) * (1.0 / 16777216.0), word

    @triton.jit
    def entries_kernel(
        out, seed, first, rows, column, columns, SIGNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """Rows `first` on and columns `column` on of a matrix of probes, to `out` (rows, columns)."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        low, high = halves(tl.load(seed))
        feature, stream = (first + row).to(tl.uint32), 2 * (column + place).to(tl.uint32)
        uniform, word = _uniform(feature, low, high, stream)
        if SIGNS:
            value = 1.0 - (word & 1).to(tl.float32) * 2.0
        else:
            angle, _ = _uniform(feature, low, high, stream + 1)
            value = tl.sqrt(-2.0 * tl.log(1.0 - uniform)) * tl.cos(angle * _TAU)
        inside = (row < rows) & (place < columns)
        tl.store(out + row * columns + place, value.to(out.dtype.element_ty), inside)


def entries(
    seed: Tensor, first: int, last: int, columns: range, signs: bool, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Rows `first` to `last` of these columns of Z, signs or normal numbers: (last - first, columns) of `dtype`.

    `seed` is int64 with one element.
    """
    out = torch.empty(last - first, len(columns), dtype=dtype, device=seed.device)
    wide = min(_COLUMNS, triton.next_power_of_2(len(columns)))
    tall = max(1, _ENTRIES // wide)
    grid = triton.cdiv(last - first, tall), triton.cdiv(len(columns), wide)
    with launched_on(seed):
        entries_kernel[grid](
            out, seed, first, last - first, columns.start, len(columns), SIGNS=signs, ROWS=tall, COLUMNS=wide
        )
    return out
