"""What stands for this version of the package in keys of compile caches."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("xconv_fx", "xconv_fx.cost_model", "xconv_fx.passes")


@functools.cache
def source_hash() -> str:
    """Hash of this package's sources, as they were when it was first asked for: part of every compile cache key."""
    return hash_of({folder for package in PACKAGES for folder in _folders(package)})


def _folders(package: str) -> list[Path]:
    """Where a package lies. Imports nothing but what it is part of."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    return [Path(folder) for folder in spec.submodule_search_locations]


def hash_of(folders: Iterable[Path]) -> str:
    """Hash of all Python files in these folders."""
    digest = hashlib.sha256()
    for folder in sorted(folders):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
