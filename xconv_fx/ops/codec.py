"""The table of codecs: what can be held between forward and backward instead of a tensor.

One row a codec. The planner reads bytes, noise and traffic; the rewrite calls `encode` and `decode`, which consist of
traceable operators only. For which residuals a codec is legal the families of the planner say. Adding a codec means
writing a file that registers a row, which `ops/__init__.py` imports, and a family that offers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xconv_fx.codec_spec import CodecSpec

from .counter_rng import INDEX_LIMIT

# How `bits` are shared out among samples: all have the same, or so many on average, in a network that computes samples
# apart or one that mixes them, as batch normalisation does.
BY_SAMPLE = ("", "apart", "mixed")


@dataclass(frozen=True)
class SavedAs:
    """How one residual is held: all that encoding and decoding need to know before the program runs.

    `spec` says by which codec, `size` is the logical shape, `order` its dimensions from the outermost in memory to the
    innermost.
    """

    spec: CodecSpec
    size: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    def varied(self, **parameters: Any) -> SavedAs:
        """The same tensor, held with other parameters of its codec."""
        return replace(self, spec=replace(self.spec, **parameters))


@dataclass(frozen=True)
class Codec:
    """One way to hold a residual.

    `encode(x, seed, held)` gives the payload and `decode(payload, seed, held)` the tensor back, with strides dense in
    `held.order`; `seed` is an int64 tensor with one element, the same for both, or for "fixed" its table of scales.
    `seeded` says that it is a seed. `payload_bytes(held)` is exact.
    `noise(held)` predicts E|decoded - x|^2 / E|x|^2 for x of independent normal values. `traffic(held)` is the bytes
    that encode and decode read and write, each as kernels of their own. `counts(held)` is how many numbers its kernels
    count in an int32, random draws above all; beyond `counter_rng.INDEX_LIMIT` it is no way to hold the tensor.
    """

    name: str
    lossless: bool
    encode: Callable[[Tensor, Tensor, SavedAs], tuple[Tensor, ...]]
    decode: Callable[[tuple[Tensor, ...], Tensor, SavedAs], Tensor]
    payload_bytes: Callable[[SavedAs], int]
    noise: Callable[[SavedAs], float]
    traffic: Callable[[SavedAs], int]
    seeded: bool = False
    counts: Callable[[SavedAs], int] = lambda held: 0

    def can_count(self, held: SavedAs) -> bool:
        """Whether its kernels can count what they count of this tensor."""
        return self.counts(held) <= INDEX_LIMIT


_CODECS: dict[str, Codec] = {}


def register(codec: Codec) -> Codec:
    """Adds a row. Raises `ValueError` on a name that is taken."""
    if codec.name in _CODECS:
        raise ValueError(f"codec {codec.name!r} is registered already; registered: {', '.join(_CODECS)}")
    _CODECS[codec.name] = codec
    return codec


def codec_of(name: str) -> Codec:
    """The row of that name. Raises `ValueError` that lists the names there are."""
    if name not in _CODECS:
        raise ValueError(f"codec={name!r}: must be one of {', '.join(_CODECS)}")
    return _CODECS[name]


def names() -> tuple[str, ...]:
    """Names of all codecs, in the order of their registration."""
    return tuple(_CODECS)
