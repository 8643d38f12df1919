"""What residuals that are made again need of those that they are made from, as needs between the solver's options.

* "recompute": exact sources, kept or made again exactly themselves.
* "replay": sources that are exact or quantised, in its `bits` or more.
* "signed": sources that are normalised held as `fixed` in its `bits`; others as for a "replay".
* "rerun" of a convolution: kept sources, or ones replayed from kept ones: one convolution is run again at a time, never
  a whole forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

from .problem import PlanningProblem
from .storage import StorageCandidate, items_of

Suits = Callable[[StorageCandidate], bool]


def link(planning: PlanningProblem) -> PlanningProblem:
    """Fill in the needs of residuals that are made again."""
    index = {residual.name: i for i, residual in enumerate(planning.residuals)}
    named = dict(zip(index, planning.candidates, strict=True))
    # First which options are left, then their places: a source with a fixed codec may allow nothing.
    left = {
        name: tuple(c for c in row if all(_places(named[s], suits) for s, suits in _needed(planning, name, c).items()))
        for name, row in named.items()
    }
    rows = tuple(
        tuple(
            replace(c, option=replace(c.option, needs=tuple(
                (index[source], _places(left[source], suits)) for source, suits in _needed(planning, name, c).items()
            )))
            for c in row
        )
        for name, row in left.items()
    )  # fmt: skip
    return replace(
        planning, candidates=rows, problem=replace(planning.problem, items=items_of(planning.residuals, rows))
    )


def _needed(planning: PlanningProblem, name: str, candidate: StorageCandidate) -> dict[str, Suits]:
    """Which options of others a candidate of the residual `name` can be made again from."""
    kind = candidate.option.name
    if kind not in ("recompute", "replay", "signed", "rerun"):
        return {}
    sources = planning.chains[name].sources
    near: Suits = functools.partial(_is_near, candidate.bits)
    if kind == "signed":
        return {
            source: functools.partial(_is_fixed, candidate.bits) if source in planning.norms else near
            for source in sources
        }
    if kind != "rerun":
        return dict.fromkeys(sources, _is_exact if kind == "recompute" else near)
    behind = [far for source in sources if source in planning.chains for far in planning.chains[source].sources]
    return {**dict.fromkeys(sources, _is_close_by), **dict.fromkeys(behind, _is_kept)}


def _is_kept(candidate: StorageCandidate) -> bool:
    return candidate.option.name == "keep"


def _is_close_by(candidate: StorageCandidate) -> bool:
    return candidate.option.name in ("keep", "recompute")


def _is_exact(candidate: StorageCandidate) -> bool:
    return candidate.option.name in ("keep", "recompute", "rerun")


def _is_near(bits: int, candidate: StorageCandidate) -> bool:
    """Exact, or in codes of so many bits or more."""
    return _is_exact(candidate) or (candidate.option.name == "quantize" and (candidate.choice.bits or 0) >= bits)


def _is_fixed(bits: int, candidate: StorageCandidate) -> bool:
    return candidate.choice.codec == "fixed" and candidate.choice.bits == bits


def _places(row: Iterable[StorageCandidate], suits: Suits) -> frozenset[int]:
    return frozenset(place for place, candidate in enumerate(row) if suits(candidate))
