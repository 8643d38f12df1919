"""Names of the ways to hold a residual."""

from __future__ import annotations

from xconv_fx.planner.storage import StorageCandidate


def way(candidate: StorageCandidate) -> str:
    """The codec with the width of its codes, or how the residual is recomputed."""
    choice = candidate.choice
    return candidate.kind.name.lower() if choice.codec == "recompute" else f"{choice.codec}{choice.bits or ''}"
