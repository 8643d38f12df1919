"""The probes that the planner is offered for a residual: a ladder of sizes, each with the parameters of least noise.

A payload of given bytes may hold many coarse sums or fewer precise ones, with the channels' means beside them or more
sums in their place. Which is better depends on the tensor's size: means take 4 bytes a channel and sample, little for
a large image, more than the sums for one of 7x7. So every rung compares them, by the noise that is expected, and offers
one; the solver chooses among the rungs. Rungs are close where quantised codes end, which are better at equal bytes.

What is expected of a layer is what was measured of it, or else a prior (`noise/expected.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import ceil, prod

from xconv_fx.noise.expected import expected_noise
from xconv_fx.ops.codec import SavedAs, codec_of
from xconv_fx.ops.fold import FEWEST
from xconv_fx.ops.layout import fitting_probes

# Elements held in the bytes of one float32.
RUNGS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
SUM_BITS = (2, 4)
_ROUNDS = 8


def prior(held: SavedAs) -> float:
    """The noise that is expected of a layer's input of which nothing is known."""
    return expected_noise(held, rectified=True)


def probe_candidates(blank: SavedAs, kinds: Sequence[str], noise: Callable[[SavedAs], float] = prior) -> list[SavedAs]:
    """Probes of the given `kinds` for the tensor of `blank`, one without parameters; the largest payload first.

    `noise` says what is expected of a way to hold it.
    """
    length = prod(blank.size[1:])
    if blank.order[0] != 0 or len(blank.size) < 2:
        return []
    found: dict[SavedAs, None] = {}
    for rung in RUNGS:
        if "fold" in kinds:
            choices = [_folds(blank.varied(kind="fold", bits=bits, means=means), 4 * prod(blank.size) // rung)
                       for bits, means in itertools.product(SUM_BITS, (True, False))]  # fmt: skip
            fitting = [held for held in choices if held is not None]
            found.update(dict.fromkeys([min(fitting, key=noise)] if fitting else []))
        elif ceil(length / rung) >= FEWEST:
            found.update((blank.varied(probes=ceil(length / rung), kind=kind), None) for kind in kinds)
    return list(found)


def _folds(held: SavedAs, room: int) -> SavedAs | None:
    """The folds of the most sums in at most `room` bytes; None when these are too few."""
    if held.spec.means and len(held.size) < 3:
        return None
    length = prod(held.size[1:])
    limit = length
    for _ in range(_ROUNDS):
        if limit < FEWEST:
            return None
        held = held.varied(probes=fitting_probes(held.size, held.order, limit))
        taken = codec_of(held.spec.codec).payload_bytes(held)
        if taken <= room:
            return held
        means = taken - codec_of(held.spec.codec).payload_bytes(held.varied(means=False))
        assert held.spec.probes is not None
        limit = min(held.spec.probes - 1, int(held.spec.probes * (room - means) / (taken - means)))
    return None
