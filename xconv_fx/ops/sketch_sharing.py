"""One sketch of an input that several layers read: a residual block's convolution and its shortcut, branches, heads.

A layer of `sketched_layers.py` that reads the very tensor that another one has read, with equal settings, takes that
one's payload and seed, as the compiler holds one payload of a residual whatever number of layers read it. So less is
held, and the same seed gives the same gradients in both. A sketch is shared

* by readers of one tensor object in one version: a write in place makes another input of it. A view, or a copy, is
  another object and has a sketch of its own;
* until one of its layers reads the input again, or any sketching layer runs its backward: with that a new forward has
  begun, whose draws are to be new;
* on one CUDA stream, and within one trace: nothing that is traced enters eager code, or the other way round. In the
  code of compilers, layers share what they would share in eager code.

Nothing is kept alive. Inputs and payloads are referred to weakly, so that a payload lives as long as the autograd
graphs that read it; the seed, of eight bytes, lives with the input. A payload that is gone while its sketch is still
shared (under hooks of saved tensors, as those of `torch.utils.checkpoint`) is made again from the seed. Thus what is
shared never depends on when memory is freed.

Every layer draws a seed, also the one that then takes another's: a checkpointed segment that is run again may share
less than it did, and what else is random in it must not notice.

Threads that read one tensor share as well. Which of them draws first is up to them, as with all that draws from torch's
generator.

Known gaps: writes through `.data` are not seen, as in all of autograd. Under hooks that pack what is saved, one sketch
is held once for each of its layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from xconv_fx import hooks
from xconv_fx.hooks.autograd import version_of

from .codec import SavedAs

Encode = Callable[[Tensor], Sequence[Tensor]]


@dataclass
class _Sketch:
    """A sketch that further layers may take: of what, by which seed, and the weights of the layers that have it."""

    version: int
    held: SavedAs
    surroundings: tuple[Any, ...]
    seed: Tensor
    payload: tuple[TensorWeakRef, ...] = ()
    readers: set[int] = field(default_factory=set)

    def serves(self, other: _Sketch) -> bool:
        """Whether a layer that would make the `other` sketch of the same tensor can take this one."""
        same = self.version == other.version and self.held == other.held and self.surroundings == other.surroundings
        return same and not other.readers & self.readers

    def alive(self) -> list[Tensor] | None:
        """The payload, or None where something of it is gone."""
        parts = [reference() for reference in self.payload]
        return None if not parts or any(part is None for part in parts) else parts


_sketches = WeakTensorKeyDictionary()
_backwards = 0


def begin_backward() -> None:
    """A layer runs its backward: what reads an input from now on is another forward."""
    global _backwards
    _backwards += 1


def shared(source: Tensor, weight: Tensor, seed: Tensor, held: SavedAs, encode: Encode) -> tuple[list[Tensor], Tensor]:
    """Payload and seed for a layer with this `weight` that reads `source`, of which it would hold `held`.

    They are those of an earlier layer, or `encode(seed)` and `seed`.
    """
    if source.is_inference():  # It has no version.
        return list(encode(seed)), seed
    sketch = _Sketch(version_of(source), held, _surroundings(source), seed, readers={id(weight)})
    earlier = _sketches.get(source)
    if earlier is not None and earlier.serves(sketch):
        earlier.readers |= sketch.readers
        sketch = earlier
    else:
        _sketches[source] = sketch
    payload = sketch.alive()
    if payload is None:
        payload = list(encode(sketch.seed))
        sketch.payload = tuple(TensorWeakRef(part) for part in payload)
    return payload, sketch.seed


def _surroundings(source: Tensor) -> tuple[Any, ...]:
    """What must be the same for layers that share: the forward, the stream, and whatever traces operations."""
    stream = torch.cuda.current_stream(source.device) if source.is_cuda and torch.cuda.is_initialized() else None
    return _backwards, stream, *(weakref.ref(mode) for mode in hooks.dispatch_modes())
