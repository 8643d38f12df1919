"""A case: one network, how its step is written, and the options that it is compiled with.

Everything is drawn from one seed and number, and all of it is JSON: a case can be stored, shrunk, and run again.
"""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass, field
from typing import Any

from .networks import Piece, draw_piece
from .options import draw_options

LOSSES = {
    "square": "y.square().mean()",
    "mse": "F.mse_loss(y, t)",
    "l1": "F.l1_loss(y, t)",
    "written": "((y - t) ** 2).mean()",
    "charbonnier": "((y - t) ** 2 + 1e-6).sqrt().mean()",
    "cross_entropy": "F.cross_entropy(y, t.argmax(1))",
    "dice": "F.cross_entropy(y, t.argmax(1)) + 1 - (2 * (y.softmax(1) * t).flatten(2).sum(2)"
    " / (y.softmax(1) + t.abs()).flatten(2).sum(2)).mean()",
    "focal": "((1 - torch.exp(-(ce := F.cross_entropy(y, t.argmax(1), reduction='none')))) ** 2 * ce).mean()",
    "bce": "F.binary_cross_entropy_with_logits(y, t.sigmoid())",
    "kl": "F.kl_div(y.log_softmax(1), t.softmax(1), reduction='batchmean') / y[0, 0].numel()",
    "huber": "F.smooth_l1_loss(y, t)",
}

# How the network's result is made of `x`, its last features.
OUTPUTS = ("plain", "conv", "conv", "linear", "view", "dict", "tuple", "argmax", "detached")

# A second input, and the first line that reads it.
SECOND = {
    "": ("", ""),
    "channel": ("torch.randn(B, 1, *SIZE)", "x = torch.cat([x, z], 1)"),
    "scale": ("torch.randn(B, C, *[1] * len(SIZE))", "x = x * (1 + 0.1 * z)"),
    "shared": ("torch.randn(1, C, *SIZE)", "x = x + 0.1 * z"),
    "scalar": ("torch.rand(())", "x = x * (0.5 + z)"),
    "vector": ("torch.randn(C)", "x = x + z.view(1, -1, *[1] * (x.dim() - 2))"),
    "time": ("torch.rand(B)", "x = x * (1 + z.view(-1, *[1] * (x.dim() - 1)).sin())"),
}


@dataclass(frozen=True)
class Case:
    """One network and how it is trained.

    `dims` are the spatial dimensions; `precision` one of float32, float64, bfloat16 and autocast; `calls` how often the
    model runs before one backward; `steps` how many steps are compared, with an optimiser between them; `between`
    what happens between steps ("eval": a call for evaluation, "batch": a smaller batch, "": nothing); `mutates` whether
    the forward changes its input in place; `frozen` how many of the first pieces have no gradient.
    """

    dims: int = 2
    batch: int = 4
    channels: int = 3
    size: tuple[int, ...] = (16, 16)
    pieces: tuple[Piece, ...] = ()
    output: str = "plain"
    loss: str = "square"
    second: str = ""
    precision: str = "float32"
    channels_last: bool = False
    input_grad: bool = False
    mutates: bool = False
    frozen: int = 0
    calls: int = 1
    steps: int = 2
    between: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Case:
        data = json.loads(text)
        return Case(**{**data, "size": tuple(data["size"]), "pieces": tuple(data["pieces"])})

    def but(self, **changes: Any) -> Case:
        """The same but for these fields."""
        return dataclasses.replace(self, **changes)


def _size(rng: random.Random, dims: int) -> tuple[int, ...]:
    whole = {1: (128, 256, 300, 129), 2: (16, 24, 32, 28, 15, 33), 3: (8, 8, 9, 12)}[dims]
    first = rng.choice(whole)
    return tuple(first if rng.random() < 0.7 else rng.choice(whole) for _ in range(dims))


def draw_case(seed: int, number: int) -> Case:
    """The case of this number; the same on every machine."""
    rng = random.Random(f"{seed}/{number}")
    dims = rng.choices([1, 2, 3], [2, 6, 2])[0]
    batch = rng.choice([1, 2, 3, 4, 4, 6, 8, 8, 16])
    mutates = rng.random() < 0.06
    return Case(
        dims=dims,
        batch=batch,
        channels=rng.choice([1, 2, 3, 3, 4, 8, batch]),
        size=_size(rng, dims),
        pieces=tuple(draw_piece(rng) for _ in range(rng.randint(3, 7))),
        output=rng.choice(OUTPUTS),
        loss=rng.choice(list(LOSSES)),
        second=rng.choice(list(SECOND)) if rng.random() < 0.2 else "",
        precision=rng.choices(["float32", "float64", "bfloat16", "autocast"], [14, 2, 1, 2])[0],
        channels_last=rng.random() < 0.15 and dims > 1,
        input_grad=rng.random() < 0.15 and not mutates,
        mutates=mutates,
        frozen=rng.choice([0, 0, 0, 0, 0, 0, 1, 2]),
        calls=rng.choice([1, 1, 1, 1, 1, 1, 2, 3]),
        steps=rng.choice([2, 2, 3]),
        between=rng.choice(["", "", "", "", "", "", "eval", "batch"]),
        options=draw_options(rng, batch),
    )
