"""What a report is of: versions of everything that matters, and the board."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from xconv_fx import __version__
from xconv_fx.device.rates import Machine, spec
from xconv_fx.fingerprint import source_hash

PACKAGES = ("triton", "numpy", "scipy", "networkx", "sympy")


def versions(device: str) -> dict[str, Any]:
    """Versions and the machine, by name; nothing that tells whose it is."""
    found: dict[str, Any] = {
        "xconv-fx": __version__,
        "sources": source_hash()[:16],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": Machine.of("cpu").processor,
        "threads": torch.get_num_threads(),
        "rates": "measured" if spec(device).calibrated else "generic",
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | (_board() if device == "cuda" else {})


def _board() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "board": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "boards": torch.cuda.device_count(),
    }
