"""What stands for this version of the package in keys of compile caches."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import xconv_fx
from xconv_fx import cost_model, passes


@functools.cache
def source_hash() -> str:
    """Hash of this package's sources, as they were when it was first asked for: part of every compile cache key."""
    return hash_of({Path(str(package.__file__)).parent for package in (xconv_fx, passes, cost_model)})


def hash_of(folders: Iterable[Path]) -> str:
    """Hash of all Python files in these folders."""
    digest = hashlib.sha256()
    for folder in sorted(folders):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
