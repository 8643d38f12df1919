"""Seeds of what a step draws: of a fixed sequence, from torch's generator, and others on every rank.

The option `seed` makes every random draw of a compiled model repeatable on its own. A stream is a generator of ours:
the n-th step of a stream draws the n-th seeds, whatever else the process does. Without it a step's seeds come from
torch's generator, which `torch.manual_seed` rules and which other code advances.

A CUDA graph that is replayed launches again what was captured, with the same numbers from the host. torch's generator
of a device is one of the exceptions: a replay moves its offset on. So `seeds` may be captured. A stream's generator is
on the host, so that its seeds are the same on every device: `stream_seeds` stays outside of what is captured.

Code that is not compiled by this backend draws its seeds with `draw_seed`, from torch's generator: an operator of its
own, so that compilers leave it alone, and the same `torch.manual_seed` gives the same seeds eagerly, in a graph, and in
the code of any compiler.

Frameworks seed the processes of a distributed run alike. Their gradients' errors would then be the same, and would not
average out: so the rank is mixed into every seed. It is read when seeds are drawn, for compiled code is shared.
"""

from __future__ import annotations

import torch
from torch import Tensor

# All int64 but the greatest.
_RANGE = (-(2**63), 2**63 - 1)

# An odd number that has nothing to do with those of the hash: 2**64 over the golden ratio.
_RANKS_APART = 0x9E3779B97F4A7C15

_generators: dict[int, torch.Generator] = {}


def start(stream: int, seed: int) -> None:
    """Begin the sequence that `seed` determines under the name `stream`."""
    _generators[stream] = torch.Generator().manual_seed(seed)


@torch.library.custom_op("xconv::seeds", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def seeds(count: int, device: torch.device) -> Tensor:
    """Seeds from torch's generator of the device, as Inductor draws those of a compiled step: int64 (count,)."""
    return _of_this_rank(torch.randint(*_RANGE, (count,), dtype=torch.int64, device=device))


@seeds.register_fake
def _(count: int, device: torch.device) -> Tensor:
    return torch.empty((count,), dtype=torch.int64, device=device)


@torch.library.custom_op(
    "xconv::stream_seeds",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def stream_seeds(stream: int, count: int, device: torch.device) -> Tensor:
    """The next seeds of a stream: int64 (count,). Raises `ValueError` for a stream that was never started."""
    if stream not in _generators:
        raise ValueError(f"stream {stream} was not started in this process")
    drawn = torch.randint(*_RANGE, (count,), dtype=torch.int64, generator=_generators[stream])
    return _of_this_rank(drawn).to(device, non_blocking=True)


@stream_seeds.register_fake
def _(stream: int, count: int, device: torch.device) -> Tensor:
    return torch.empty((count,), dtype=torch.int64, device=device)


def _of_this_rank(drawn: Tensor) -> Tensor:
    """Seeds that differ from rank to rank where all ranks drew the same; rank 0 keeps them."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return drawn
    offset = distributed.get_rank() * _RANKS_APART % 2**64
    return drawn + (offset - 2**64 if offset >= 2**63 else offset)


@torch.library.custom_op("xconv::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_seed(like: Tensor, reader: Tensor | None = None) -> Tensor:
    """A seed from the default generator of the device of `like`: int64, one element.

    `like`, which a layer reads, ties the draw to its place, and `reader`, the layer's weight, tells it from the draws
    of other layers that read the same: without them, compilers could merge two draws, or change their order.
    """
    return _of_this_rank(torch.randint(*_RANGE, (1,), dtype=torch.int64, device=like.device))


@draw_seed.register_fake
def _(like: Tensor, reader: Tensor | None = None) -> Tensor:
    return like.new_empty((1,), dtype=torch.int64)
