"""Where a value lies: in a buffer for certain, or written apart from its other readers.

`stored` is what an encoder of several kernels reads.

Inductor inlines an activation into each of its readers until something forces it into a buffer. An encoder that reads
it twice would compute it twice and keep the activation's own inputs alive in between. In generated code `stored`
costs nothing: it gives the value its buffer. Run eagerly it is a copy, since an operator may not return its input.

`apart` is what a concatenation reads of a value that has other readers. Inductor computes the parts of a concatenation
right in their places, where all who read them find them, so that the whole of it is alive from the first of its parts
to the last reader of any. A part that is apart is written there once more; the value itself is stored elsewhere, or
inlined.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("xconv::stored", mutates_args=())
def stored(x: Tensor) -> Tensor:
    """`x` itself, in a buffer."""
    return x.clone()


@stored.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("xconv::apart", mutates_args=())
def apart(x: Tensor) -> Tensor:
    """A copy of `x`."""
    return x.clone()


@apart.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
