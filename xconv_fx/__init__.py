"""A torch.compile backend that trains convolutional networks inside a physical memory budget."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

# What is imported from here, and where it is: loaded when it is first asked for, as it needs torch.
_LAZY = {
    "Statistics": "xconv_fx.statistics",
    "calibrate": "xconv_fx.model_calibration",
    "gradient_check": "xconv_fx.gradient_noise",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
