"""What calls were found to allocate, kept on disk, so that the next process need not make them again.

One file a machine and version of torch, of one line of JSON for each call. Lines are appended whole; one that cannot be
read is passed over. What is kept holds for the same processor, the same build of torch, the same settings and the same
variables of the libraries' (`VARIABLES`); of this package's own convolutions also for the same source, and of its other
operators nothing is kept.
`XCONV_FX_PLAN_CACHE=0` turns this cache off, as it does that of plans.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch

from xconv_fx.ops import conv3d

from .rates import Machine, folder, keeps_findings

# The beginnings of variables by which libraries choose their kernels.
VARIABLES = ("ONEDNN_", "DNNL_", "MKL_", "ATEN_", "LRU_CACHE_", "TORCH_NNPACK")
_KEPT = {"aten", "prims", "mkldnn"}


def look_up(func: Any, call: Any) -> int | None:
    """Bytes that a call of this signature was found to allocate, by any process; None where nobody looked."""
    if not _is_kept(func):
        return None
    return _lines(path()).get(_key(func, call))


def keep(func: Any, call: Any, found: int) -> None:
    """Keep what was found. A folder that cannot be written to keeps nothing."""
    if not _is_kept(func):
        return
    key, file = _key(func, call), path()
    _lines(file)[key] = found
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        # One write of few bytes at the file's end: processes that look at the same time do not mix their lines.
        with file.open("ab", buffering=0) as lines:
            lines.write((json.dumps([key, found]) + "\n").encode())


def path() -> Path:
    """Where calls are kept, of this machine as it is set now."""
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith(VARIABLES))
    stands_for = repr((Machine.of("cpu").processor, torch.__version__, torch.__config__.show(), variables))
    return folder() / "scratch" / f"{hashlib.sha256(stands_for.encode()).hexdigest()[:32]}.jsonl"


def _is_kept(func: Any) -> bool:
    return keeps_findings() and (func.namespace in _KEPT or func in conv3d.OPERATORS)


def _key(func: Any, call: Any) -> str:
    source = _source() if func in conv3d.OPERATORS else ""
    return hashlib.sha256(repr((func.name(), call, source)).encode()).hexdigest()


@functools.cache
def _source() -> str:
    """What our own convolutions do."""
    return inspect.getsource(conv3d)


@functools.cache
def _lines(file: Path) -> dict[str, int]:
    """What the file says, as it was when this process first asked, with what this process has found since."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError):
                key, size = json.loads(line)
                if isinstance(key, str) and type(size) is int and size >= 0:
                    found[key] = size
    return found
