"""Random bits that need no memory: a keyed integer hash of the element index.

A codec draws random signs or roundings in the forward pass and must see the same ones in the backward pass. Storing
them would cost as much as what is saved, and a stateful generator would tie the bits to the order of execution. A
counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) computes the bits of
element i from (seed, i) alone: nothing is held but the seed, and the same bits come out of eager PyTorch and of the
generated C++ and Triton kernels.

The mixer is the two-multiplication finaliser found by Wellons' hash prospector ("lowbias32"), with a second key added
between the multiplications: with one 32-bit key, two streams out of a few ten thousand would coincide. Elements are
hashed in wrapping int32 arithmetic, because that is what Inductor vectorises. The two keys are derived in int64
arithmetic that never overflows: in scalar C++ a compiler may assume that a signed product of known sign keeps it.

Known gaps: this is statistics, not cryptography. An index is an int32: what a codec cannot count below 2**31 is refused
by `check_countable`, and not offered by the planner (`Codec.counts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INDEX_LIMIT = 2**31

_WORD = 0xFFFFFFFF
_HALF_WORD = 0xFFFF
GOLDEN = 0x9E3779B9
# The hash of any one number: streams do not start at zero, which the mixer maps to itself.
ORIGIN = 0x23064794
FIRST_FACTOR = 0x7FEB352D
SECOND_FACTOR = 0x846CA68B
_UNIT = 2.0**-24


@dataclass(frozen=True)
class Arithmetic:
    """What the hash needs besides the operators `+ * & ^`: constants, arithmetic right shifts, int64 to int32.

    The hash is written once and used twice, on tensors and on the values of Inductor's loop bodies. Dtypes are
    passed along because the latter do not know theirs.
    """

    constant: Callable[[int, torch.dtype], Any]
    shift: Callable[[Any, int, torch.dtype], Any]
    narrow: Callable[[Any], Any]


TENSORS = Arithmetic(
    constant=lambda value, dtype: value,
    shift=lambda word, count, dtype: word >> count,
    narrow=lambda word: word.to(torch.int32),
)


def signed(word: int) -> int:
    """The int32 value that has the same 32 bits as the unsigned `word`."""
    return (word & _WORD) - ((word & 0x80000000) << 1)


def check_countable(size: Sequence[int], count: int) -> None:
    """Raises `ValueError` when an int32 cannot count the `count` numbers that a codec of a tensor of `size` needs."""
    if count > INDEX_LIMIT:
        raise ValueError(
            f"size={tuple(size)}: its codec counts {count} random numbers and places, which an int32 cannot; slices of "
            "the batch have fewer"
        )


def constants(stream: int) -> tuple[int, int]:
    """Two int32 constants that tell the draws under one seed apart."""
    first = _mix_int(ORIGIN + stream * GOLDEN)
    return signed(first), signed(_mix_int(first + GOLDEN))


def derive_keys(low: Any, high: Any, apart: tuple[Any, Any], over: Arithmetic) -> tuple[Any, Any]:
    """The two int32 keys of a stream from the halves of the seed (int64 in 0 .. 2**32 - 1) and its two `constants`.

    Each key depends on both halves: streams that share the first key and differ in the second are correlated, because
    only one multiplication follows the second key.
    """
    word = over.constant(_WORD, torch.int64)
    first, second = (
        _mix((half ^ over.constant(constant, torch.int64)) & word, over)
        for half, constant in zip((low, high), apart, strict=True)
    )
    keys = (_mix(first ^ second, over), _mix((first + second) & word, over))
    return over.narrow(_signed(keys[0], over)), over.narrow(_signed(keys[1], over))


def keyed_hash(index: Any, keys: tuple[Any, Any], over: Arithmetic) -> Any:
    """32 random bits (int32) for every int32 `index`, under two int32 `keys`."""
    word = _keyed_product(index, keys, over)
    return word ^ logical_shift(word, 16, over)


def keyed_halves(index: Any, keys: tuple[Any, Any], count: int, over: Arithmetic) -> tuple[Any, Any]:
    """The `count` (1..16) lowest bits of the lower and of the upper half of `keyed_hash`, in fewer operations."""
    word, mask = _keyed_product(index, keys, over), over.constant((1 << count) - 1, torch.int32)
    upper = over.shift(word, 16, torch.int32)
    return (word ^ upper) & mask, upper & mask


def _keyed_product(index: Any, keys: tuple[Any, Any], over: Arithmetic) -> Any:
    word = index ^ keys[0]
    word = (word ^ logical_shift(word, 16, over)) * over.constant(FIRST_FACTOR, torch.int32)
    word = (word ^ logical_shift(word, 15, over)) + keys[1]
    return word * over.constant(signed(SECOND_FACTOR), torch.int32)


def logical_shift(word: Any, count: int, over: Arithmetic = TENSORS) -> Any:
    """Right shift of an int32 by `count` in 1..31 that fills with zeros."""
    return over.shift(word, count, torch.int32) & over.constant((1 << (32 - count)) - 1, torch.int32)


def split_seed(seed: Any, over: Arithmetic = TENSORS) -> tuple[Any, Any]:
    """The low and high 32 bits of the int64 `seed`, as int64 in 0 .. 2**32 - 1."""
    word = over.constant(_WORD, torch.int64)
    return seed & word, over.shift(seed, 32, torch.int64) & word


def random_bits(index: Tensor, seed: Tensor, stream: int = 0) -> Tensor:
    """32 random bits for every element of `index`.

    Args:
        index: int32, any shape; which draw. Equal indices give equal bits.
        seed: int64 with one element, drawn anew for each residual in each step.
        stream: a constant that differs per use within a residual.

    Returns:
        int32 of the shape of `index`.
    """
    return keyed_hash(index, _keys(seed, stream), TENSORS)


def random_halves(index: Tensor, count: int, seed: Tensor, stream: int = 0) -> tuple[Tensor, Tensor]:
    """Two independent draws for every element of `index`: integers below 2**count, `count` in 1..16.

    The other arguments are those of `random_bits`, from whose lower and upper halves the draws are taken.
    """
    return keyed_halves(index, _keys(seed, stream), count, TENSORS)


def _keys(seed: Tensor, stream: int) -> tuple[Any, Any]:
    low, high = split_seed(seed.reshape(()))
    return derive_keys(low, high, constants(stream), TENSORS)


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1) from the upper 24 of 32 random bits: every value is exact and 1 is never reached."""
    return logical_shift(bits, 8).to(torch.float32) * _UNIT


def random_signs(bits: Tensor, bit: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """-1 where bit number `bit` (0..30) of `bits` is set, else 1."""
    return (1 - ((bits >> bit) & 1) * 2).to(dtype)


def _mix(word: Any, over: Arithmetic) -> Any:
    """The mixer without keys, on int64 in 0 .. 2**32 - 1."""
    word = _product(word ^ over.shift(word, 16, torch.int64), FIRST_FACTOR, over)
    word = _product(word ^ over.shift(word, 15, torch.int64), SECOND_FACTOR, over)
    return word ^ over.shift(word, 16, torch.int64)


def _product(word: Any, factor: int, over: Arithmetic) -> Any:
    """`word * factor` modulo 2**32: by halves, whose products stay below 2**48."""
    half, multiplier = over.constant(_HALF_WORD, torch.int64), over.constant(factor, torch.int64)
    low = (word & half) * multiplier
    high = (over.shift(word, 16, torch.int64) * multiplier) & half
    return (low + high * over.constant(1 << 16, torch.int64)) & over.constant(_WORD, torch.int64)


def _signed(word: Any, over: Arithmetic) -> Any:
    sign = over.constant(0x80000000, torch.int64)
    return (word ^ sign) + over.constant(-0x80000000, torch.int64)


def _mix_int(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 16)) * FIRST_FACTOR) & _WORD
    word = ((word ^ (word >> 15)) * SECOND_FACTOR) & _WORD
    return word ^ (word >> 16)
