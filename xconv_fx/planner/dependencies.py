"""What candidates require of the residuals that they are recomputed from, as needs between the solver's options."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .problem import PlanningProblem
from .requirement import Requirement
from .storage import StorageCandidate, items_of

Row = tuple[StorageCandidate, ...]


def link(planning: PlanningProblem) -> PlanningProblem:
    """Fill in the needs of residuals that are recomputed."""
    index = {residual.name: i for i, residual in enumerate(planning.residuals)}
    named = dict(zip(index, planning.candidates, strict=True))
    # First which options are left, then their places: a source with a fixed codec may allow nothing.
    left = {
        name: tuple(c for c in row if all(_places(named[source], required) for source, required in c.requires))
        for name, row in named.items()
    }
    rows = tuple(tuple(_linked(candidate, index, left) for candidate in row) for row in left.values())
    return replace(
        planning, candidates=rows, problem=replace(planning.problem, items=items_of(planning.residuals, rows))
    )


def _linked(candidate: StorageCandidate, index: dict[str, int], rows: dict[str, Row]) -> StorageCandidate:
    """The candidate with its needs, where residuals have these places and these candidates."""
    needs = tuple((index[source], _places(rows[source], required)) for source, required in candidate.requires)
    return replace(candidate, option=replace(candidate.option, needs=needs))


def _places(row: Iterable[StorageCandidate], required: Requirement) -> frozenset[int]:
    """The places of the candidates that are what is required."""
    return frozenset(
        place
        for place, candidate in enumerate(row)
        if (candidate.kind in required.kinds and (required.by is None or candidate.start <= required.by))
        or candidate.choice.spec in required.specs
    )
