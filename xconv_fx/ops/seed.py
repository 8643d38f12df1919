"""Seeds of a fixed sequence: the option `seed` makes every random draw of a compiled model repeatable on its own.

Without it a step's seeds come from torch's generator, which `torch.manual_seed` rules and which other code advances.
A stream is a generator of ours: the n-th step of a stream draws the n-th seeds, whatever else the process does.

Code that is not compiled by this backend draws its seeds with `draw_seed`, from torch's generator: an operator of its
own, so that compilers leave it alone, and the same `torch.manual_seed` gives the same seeds eagerly, in a graph, and in
the code of any compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

# All int64 but the greatest, in the way in which Inductor draws the seeds of a compiled step.
_RANGE = (-(2**63), 2**63 - 1)

_generators: dict[int, torch.Generator] = {}


def start(stream: int, seed: int) -> None:
    """Begin the sequence that `seed` determines under the name `stream`."""
    _generators[stream] = torch.Generator().manual_seed(seed)


@torch.library.custom_op("xconv::seeds", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def seeds(stream: int, count: int, device: torch.device) -> Tensor:
    """The next seeds of a stream: int64 (count,). Raises `ValueError` for a stream that was never started."""
    if stream not in _generators:
        raise ValueError(f"stream {stream} was not started in this process")
    drawn = torch.randint(*_RANGE, (count,), dtype=torch.int64, generator=_generators[stream])
    return drawn.to(device, non_blocking=True)


@seeds.register_fake
def _(stream: int, count: int, device: torch.device) -> Tensor:
    return torch.empty((count,), dtype=torch.int64, device=device)


@torch.library.custom_op("xconv::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_seed(like: Tensor, reader: Tensor | None = None) -> Tensor:
    """A seed from the default generator of the device of `like`: int64, one element.

    `like`, which a layer reads, ties the draw to its place, and `reader`, the layer's weight, tells it from the draws
    of other layers that read the same: without them, compilers could merge two draws, or change their order.
    """
    return torch.randint(*_RANGE, (1,), dtype=torch.int64, device=like.device)


@draw_seed.register_fake
def _(like: Tensor, reader: Tensor | None = None) -> Tensor:
    return like.new_empty((1,), dtype=torch.int64)
