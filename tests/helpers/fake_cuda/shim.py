"""The shim: a library that registers a CUDA device with a torch that was built for the CPU. It is built with g++.

Loading it is for a process of its own, and comes before `import torch`, which this module does without.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

# The torch and the triton whose private parts were read.
TORCH, TRITON = "2.13.0", "3.7.1"
_SOURCE = Path(__file__).with_suffix(".cpp")


def missing() -> str:
    """Why there is no fake device here; "" where there is one."""
    if shutil.which("g++") is None:
        return "there is no g++, which builds the shim of a CUDA device"
    for package, checked in (("torch", TORCH), ("triton", TRITON)):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed"
        if version.split("+")[0] != checked:
            return f"the fake CUDA device was checked on {package} {checked}, this is {version}"
    return ""


def build(folder: Path) -> Path:
    """The shim in `folder`, built unless it is there. Raises `CalledProcessError` where it cannot be built."""
    library = folder / "shim.so"
    if not library.exists():
        torch = _torch()
        includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        made = folder / f"shim.{os.getpid()}.so"  # Other processes of a test run build theirs at the same time.
        subprocess.run(
            ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", *includes, str(_SOURCE), "-o", str(made),
             f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"],
            check=True,
        )  # fmt: skip
        made.replace(library)
    return library


def load(library: Path) -> None:
    """Give this process the device. Raises `RuntimeError` after `import torch`, which has asked for it already."""
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the shim")
    ctypes.CDLL(str(_torch() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent
