"""Building C++ that needs no vector instructions, which torch 2.12 cannot be told: there it gets them all the same."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any


def plain_library(source: str, linked: Sequence[str]) -> Any:
    """The library of this source, built by Inductor with these flags of the linker. Raises what the build raises."""
    from torch._inductor.codecache import CppCodeCache

    known = inspect.signature(CppCodeCache.load_async).parameters
    plain = {"needs_vec_isa": False} if "needs_vec_isa" in known else {}
    return CppCodeCache.load(source, extra_flags=linked, **plain)
