"""What one call allocates besides its results, by making the call and watching the allocator.

Libraries decide inside a call how much memory they take: by shapes, strides, dtypes, the processor, and the number of
threads. No rule of ours follows them. So the call is made, once, on tensors of the same shapes and strides, and what
was found is kept for calls of the same signature under the same settings, on disk as well (`known_scratch.py`).

The arguments are legal ones: zeros, so that integers are in range, and where an operation refuses those (a matrix that
has no inverse) ones on the diagonal. An operation that refuses both, or whose arguments take more than `LARGEST` bytes,
is bounded instead: a copy of everything that it reads and writes (`copies`).

Known gaps: a call whose scratch depends on the values of its arguments is measured for those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from xconv_fx.hooks import dispatch
from xconv_fx.hooks.pytree import tree_leaves
from xconv_fx.measure import allocated_by, storage_bytes

from . import known_scratch

# The largest operands, in bytes, on which a call is made to see what it allocates.
LARGEST = 1 << 28


@dataclass(frozen=True)
class Shaped:
    """A tensor without data: its shape, strides and dtype."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Shaped:
        return cls(tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), tensor.dtype)

    @property
    def reach(self) -> int:
        """Elements of memory from the first to the last."""
        if 0 in self.size:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))

    @property
    def bytes(self) -> int:
        return self.reach * self.dtype.itemsize

    def cut(self, dim: int, extent: int) -> Shaped:
        """A part along one dimension, with memory of its own if the whole has that; a view is copied by libraries."""
        size = (*self.size[:dim], extent, *self.size[dim + 1 :])
        dense = self.reach == prod(self.size)
        if extent == self.size[dim] or not dense or 0 in size:
            return replace(self, size=size)
        strides, step = [0] * len(size), 1
        # Of dimensions with the same stride those of extent 1 lie inside.
        for place in sorted(range(len(size)), key=lambda d: (self.stride[d], self.size[d])):
            strides[place], step = step, step * size[place]
        return replace(self, size=size, stride=tuple(strides))

    def stand_in(self) -> Tensor:
        """A fake tensor of this form."""
        return dispatch.stand_in(self.size, self.stride, self.dtype)


def signature(value: Any) -> Any:
    """An argument without data, to be a key: tensors by their form, lists as tuples, dicts as sorted pairs."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.device.type != "cpu":
            raise TypeError(f"no stand-in for a tensor of layout {value.layout} on {value.device}")
        return Shaped.of(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(signature, value))
    if isinstance(value, Mapping):
        return tuple((name, signature(value[name])) for name in sorted(value))
    return int(value) if isinstance(value, torch.SymInt) else value


def measured(func: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...] = ()) -> int | None:
    """Bytes that one call allocates beyond its results. Arguments are signatures. None where it cannot be made."""
    if sum(shaped.bytes for shaped in shapes((args, kwargs))) > LARGEST:
        return None
    return _measured(func, args, kwargs, dispatch.settings())


@functools.cache
def _measured(func: Any, args: Any, kwargs: Any, settings: Any) -> int | None:
    call = (args, kwargs, settings)
    if (known := known_scratch.look_up(func, call)) is not None:
        return known
    for fill in (_zeros, _ones_on_the_diagonal):
        try:
            found = _made(func, args, kwargs, fill)
        except Exception:  # Whatever a library says to arguments that it does not take.
            continue
        known_scratch.keep(func, call, found)
        return found
    return None


def _made(func: Any, args: Any, kwargs: Any, fill: Callable[[Tensor], Tensor]) -> int:
    with dispatch.plainly():
        real, named = _real(args, fill), {name: _real(value, fill) for name, value in kwargs}
        peak, returned = allocated_by(lambda: func(*real, **named))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((real, named))}
        results = [one for one in returned if one.untyped_storage().data_ptr() not in given]
        return max(0, peak - storage_bytes(results))


def copies(*values: Any) -> int:
    """Bytes of a copy of every tensor among the signatures: the bound for calls that are not made."""
    return sum(prod(shaped.size) * shaped.dtype.itemsize for shaped in shapes(values))


def shapes(values: Any) -> list[Shaped]:
    """The tensors among signatures, however deep."""
    if isinstance(values, Shaped):
        return [values]
    return [shaped for value in values for shaped in shapes(value)] if isinstance(values, tuple) else []


def continued(extent: int, least: int, step: int, call: Callable[[int], int | None]) -> int | None:
    """`call(extent)`, made at `least` and at `step` more, and continued along a line; made as it is where that is less.

    Rounded up, and never less than at the larger of the two.
    """
    if extent <= least + step:
        return call(extent)
    less, more = call(least), call(least + step)
    if less is None or more is None:
        return None
    return more + max(0, -(-(more - less) * (extent - least - step) // step))


def _tensors(values: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _real(value: Any, fill: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Shaped):
        return fill(torch.empty_strided(value.size, value.stride, dtype=value.dtype))
    return tuple(_real(part, fill) for part in value) if isinstance(value, tuple) else value


def _zeros(tensor: Tensor) -> Tensor:
    # An expanded tensor has one value for many elements.
    return tensor.zero_() if 0 not in tensor.stride() else _written_once(tensor)


def _ones_on_the_diagonal(tensor: Tensor) -> Tensor:
    tensor = _zeros(tensor)
    if tensor.dim() > 1 and tensor.is_floating_point() and 0 not in tensor.stride():
        tensor.diagonal(dim1=-2, dim2=-1).fill_(1)
    return tensor


def _written_once(tensor: Tensor) -> Tensor:
    places = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    tensor[places].zero_()
    return tensor
