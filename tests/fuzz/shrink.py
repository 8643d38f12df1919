"""The smallest case that still fails in the same way.

Greedy: of the changes that make a case simpler, the first that keeps the failure is made, until none does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .cases import Case
from .networks import Piece

# Fields with the values that are simplest.
SIMPLEST: dict[str, Any] = {
    "between": "", "calls": 1, "steps": 1, "second": "", "frozen": 0, "input_grad": False, "channels_last": False,
    "precision": "float32", "output": "plain", "mutates": False, "loss": "square",
}  # fmt: skip


def simpler(case: Case) -> Iterator[Case]:
    """Cases that are simpler by one change, the largest changes first."""
    for number in range(len(case.pieces)):
        yield case.but(pieces=case.pieces[:number] + case.pieces[number + 1 :])
    for number, piece in enumerate(case.pieces):
        for smaller in _smaller(piece):
            yield case.but(pieces=case.pieces[:number] + tuple(smaller) + case.pieces[number + 1 :])
    for name, value in SIMPLEST.items():
        if getattr(case, name) != value:
            yield case.but(**{name: value})
    for name in case.options:
        yield case.but(options={key: value for key, value in case.options.items() if key != name})
    if case.batch > 2:
        yield case.but(batch=case.batch // 2)


def _smaller(piece: Piece) -> Iterator[list[Piece]]:
    """Its body in its place, or itself with less of a body."""
    body = piece.get("body", [])
    if body:
        yield body
    for number, part in enumerate(body):
        if len(body) > 1:
            yield [{**piece, "body": body[:number] + body[number + 1 :]}]
        for smaller in _smaller(part):
            yield [{**piece, "body": body[:number] + smaller + body[number + 1 :]}]


def shrink(case: Case, fails: Callable[[Case], bool], tries: int = 40) -> Case:
    """The simplest case found in at most so many tries that `fails` as this one does."""
    while tries > 0:
        for candidate in simpler(case):
            tries -= 1
            if fails(candidate):
                case = candidate
                break
            if tries <= 0:
                return case
        else:
            return case
    return case
