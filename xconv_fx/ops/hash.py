"""Random bits that need no memory: a keyed integer hash of the element index.

A codec draws random signs or roundings in the forward pass and must see the same ones in the backward pass. Storing
them would cost as much as what is saved, and a stateful generator would tie the bits to the order of execution. A
counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) computes the bits of
element i from (seed, i) alone: nothing is held but the seed, and the same bits come out of eager PyTorch and of the
generated C++ and Triton kernels.

The mixer is the two-multiplication finaliser found by Wellons' hash prospector ("lowbias32"), with a second key added
between the multiplications: with one 32-bit key, two streams out of a few ten thousand would coincide. Everything is
wrapping int32 arithmetic, because that is what Inductor vectorises.

Known gaps: this is statistics, not cryptography. 62 of the 64 seed bits are used, so that every conversion to int32
is exact. An index is an int32: tensors of 2**31 elements and more are refused by `check_addressable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INDEX_LIMIT = 2**31

_WORD = 0xFFFFFFFF
_HALF_SEED = 0x7FFFFFFF
_GOLDEN = 0x9E3779B9
_FIRST_FACTOR = 0x7FEB352D
_SECOND_FACTOR = 0x846CA68B
_UNIT = 2.0**-24


@dataclass(frozen=True)
class Arithmetic:
    """What the hash needs besides `+ * & ^` on int32 values: constants and logical right shifts.

    The hash is written once and used twice, on tensors and on the values of Inductor's loop bodies.
    """

    constant: Callable[[int], Any]
    shift: Callable[[Any, int], Any]


def logical_shift(word: Tensor, count: int) -> Tensor:
    """Right shift of int32 `word` by `count` in 1..31 that fills with zeros."""
    return (word >> count) & ((1 << (32 - count)) - 1)


TENSORS = Arithmetic(constant=lambda value: value, shift=logical_shift)


def signed(word: int) -> int:
    """The int32 value that has the same 32 bits as the unsigned `word`."""
    return (word & _WORD) - ((word & 0x80000000) << 1)


def check_addressable(size: Sequence[int]) -> int:
    """The number of elements of `size`. Raises `ValueError` when an int32 cannot count them."""
    count = 1
    for extent in size:
        count *= extent
    if count >= INDEX_LIMIT:
        raise ValueError(
            f"size {tuple(size)} has {count} elements; the random bits of a codec address {INDEX_LIMIT - 1}"
        )
    return count


def salts(salt: int, stream: int) -> tuple[int, int]:
    """Two int32 constants that tell residuals (`salt`) and the draws within one residual (`stream`) apart."""
    first = _mix_int(_mix_int(_mix_int(salt + _GOLDEN) + (salt >> 32)) + stream * _GOLDEN)
    return signed(first), signed(_mix_int(first + _GOLDEN))


def derive_keys(low: Any, high: Any, constants: tuple[int, int], over: Arithmetic) -> tuple[Any, Any]:
    """The two int32 keys of a stream from the low and high halves of the seed (int32, not negative).

    Each key depends on both halves: streams that share the first key and differ in the second are correlated, because
    only one multiplication follows the second key.
    """
    first = _mix(low ^ over.constant(constants[0]), over)
    second = _mix(high ^ over.constant(constants[1]), over)
    return _mix(first ^ second, over), _mix(first + second, over)


def keyed_hash(index: Any, keys: tuple[Any, Any], over: Arithmetic) -> Any:
    """32 random bits (int32) for every int32 `index`, under two int32 `keys`."""
    word = index ^ keys[0]
    word = (word ^ over.shift(word, 16)) * over.constant(_FIRST_FACTOR)
    word = (word ^ over.shift(word, 15)) + keys[1]
    word = word * over.constant(signed(_SECOND_FACTOR))
    return word ^ over.shift(word, 16)


def split_seed(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The low and high 31 bits of the int64 `seed`, as int32."""
    return (seed & _HALF_SEED).to(torch.int32), ((seed >> 31) & _HALF_SEED).to(torch.int32)


def random_bits(index: Tensor, seed: Tensor, salt: int, stream: int = 0) -> Tensor:
    """32 random bits for every element of `index`.

    Args:
        index: int32, any shape; which draw. Equal indices give equal bits.
        seed: int64 with one element, drawn anew each step.
        salt: a constant that differs per residual.
        stream: a constant that differs per use within a residual.

    Returns:
        int32 of the shape of `index`.
    """
    low, high = split_seed(seed.reshape(()))
    keys = derive_keys(low, high, salts(salt, stream), TENSORS)
    return keyed_hash(index, keys, TENSORS)


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1) from the upper 24 of 32 random bits: every value is exact and 1 is never reached."""
    return logical_shift(bits, 8).to(torch.float32) * _UNIT


def random_signs(bits: Tensor, bit: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """-1 where bit number `bit` (0..30) of `bits` is set, else 1."""
    return (1 - ((bits >> bit) & 1) * 2).to(dtype)


def _mix(word: Any, over: Arithmetic) -> Any:
    word = (word ^ over.shift(word, 16)) * over.constant(_FIRST_FACTOR)
    word = (word ^ over.shift(word, 15)) * over.constant(signed(_SECOND_FACTOR))
    return word ^ over.shift(word, 16)


def _mix_int(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 16)) * _FIRST_FACTOR) & _WORD
    word = ((word ^ (word >> 15)) * _SECOND_FACTOR) & _WORD
    return word ^ (word >> 16)
