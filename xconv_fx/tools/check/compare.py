"""What changed between a check's record in the lock file and its record now, and which of it is a regression.

A regression is a number that grew beyond the tolerance: the peak of the plan, the peak without a budget, the lowest
feasible budget, or what the plan adds in noise or time. Residuals and layers that changed say where that comes from;
alone they are no failure.

Known gap: layers are told apart by name. A layer inserted into a Sequential renames those after it, and all of them are
listed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .config import Tolerance
from .record import Held, Record

# The numbers of a record that may not grow: what they are called, and their unit.
LIMITED = {
    "peak": ("peak", "B"),
    "unbudgeted": ("peak without a budget", "B"),
    "lowest": ("lowest feasible budget", "B"),
    "noise": ("noise", ""),
    "time": ("added time", "s"),
}
# Below this a second a step is rounding.
TICK = 1e-6


@dataclass(frozen=True)
class Number:
    """A number that changed; `regressed` if it grew beyond the tolerance."""

    name: str
    unit: str
    before: float
    after: float
    regressed: bool


@dataclass(frozen=True)
class Difference:
    """A residual that changed: None before if it is new, None after if it is gone."""

    before: Held | None
    after: Held | None

    @property
    def layer(self) -> str:
        held = self.after or self.before
        assert held is not None
        return held.layer

    @property
    def moved(self) -> bool:
        """Whether shape, codec or bytes changed, and not only how the backward reads it."""
        then, now = self.before, self.after
        if then is None or now is None:
            return True
        return (then.shape, then.codec, then.bytes, then.held) != (now.shape, now.codec, now.bytes, now.held)

    @property
    def grown(self) -> tuple[int, int]:
        """Bytes more that are held by the plan, and that the residual has."""
        now, then = self.after, self.before
        held = (now.held if now else 0) - (then.held if then else 0)
        return held, (now.bytes if now else 0) - (then.bytes if then else 0)


@dataclass(frozen=True)
class Result:
    """A check's outcome. `problem` says in words why it cannot be compared; "" when it was."""

    name: str
    numbers: tuple[Number, ...] = ()
    residuals: tuple[Difference, ...] = ()
    layers: tuple[tuple[str, str, str], ...] = ()
    problem: str = ""
    record: Record | None = None

    @property
    def failed(self) -> bool:
        return bool(self.problem) or any(number.regressed for number in self.numbers)

    @property
    def changed(self) -> bool:
        return bool(self.numbers or self.residuals or self.layers)


def compare(name: str, before: Record, after: Record, tolerance: Tolerance) -> Result:
    """What changed, the largest growth first."""
    differences = sorted(_differences(before.residuals, after.residuals), key=lambda item: item.grown, reverse=True)
    return Result(
        name,
        tuple(_numbers(before, after, tolerance)),
        tuple(differences),
        tuple(_layers(before.layers, after.layers)),
        record=after,
    )


def _numbers(before: Record, after: Record, tolerance: Tolerance) -> Iterator[Number]:
    for field, (name, unit) in LIMITED.items():
        old, new = getattr(before, field), getattr(after, field)
        if old != new:
            slack = TICK if unit == "s" else 0
            fine = tolerance.allows(old, new - slack, in_bytes=unit == "B")
            yield Number(name, unit, old, new, regressed=not fine)


def _differences(before: Sequence[Held], after: Sequence[Held]) -> Iterator[Difference]:
    """Residuals that differ. One that another operation of its layer makes has changed; the others came or went."""
    keys: tuple[Callable[[Held], tuple[str, ...]], ...] = (
        lambda held: (held.layer, held.operation),
        lambda held: (held.layer,),
    )
    old, new = list(before), list(after)
    for key in keys:
        pairs, old, new = _paired(old, new, key)
        yield from (Difference(then, now) for then, now in pairs if then != now)
    yield from (Difference(then, None) for then in old)
    yield from (Difference(None, now) for now in new)


def _paired(
    before: Sequence[Held], after: Sequence[Held], key: Callable[[Held], tuple[str, ...]]
) -> tuple[list[tuple[Held, Held]], list[Held], list[Held]]:
    """Residuals of equal keys in pairs, in order; and what is left of both."""
    waiting: dict[tuple[str, ...], list[Held]] = defaultdict(list)
    for held in before:
        waiting[key(held)].append(held)
    pairs, rest = [], []
    for held in after:
        if queue := waiting[key(held)]:
            pairs.append((queue.pop(0), held))
        else:
            rest.append(held)
    return pairs, [held for queue in waiting.values() for held in queue], rest


def _layers(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(name, what it was, what it is) of the layers that changed; "" where there was or is none."""
    for name in dict.fromkeys((*before, *after)):
        then, now = before.get(name, ""), after.get(name, "")
        if then != now:
            yield name, then, now
