"""A torch.compile backend that trains convolutional networks inside a physical memory budget.

What is imported from here besides the backend is loaded when it is first asked for: `import xconv_fx` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xconv_fx import nn as nn
    from xconv_fx.conversion import convert as convert
    from xconv_fx.conversion import plan_and_convert as plan_and_convert
    from xconv_fx.gradient_noise import gradient_check as gradient_check
    from xconv_fx.model_calibration import calibrate as calibrate
    from xconv_fx.sample_gradients import SampleGradients as SampleGradients
    from xconv_fx.statistics import Statistics as Statistics
    from xconv_fx.substitution import substitute as substitute

__version__ = "0.1.0"

# Public names to the modules that define them. A module of the same name would hide the function once it is imported.
_HOMES = {
    "SampleGradients": "sample_gradients",
    "Statistics": "statistics",
    "calibrate": "model_calibration",
    "convert": "conversion",
    "gradient_check": "gradient_noise",
    "plan_and_convert": "conversion",
    "substitute": "substitution",
}
_MODULES = ("nn",)

__all__ = [
    "SampleGradients",
    "Statistics",
    "__version__",
    "calibrate",
    "convert",
    "gradient_check",
    "nn",
    "plan_and_convert",
    "substitute",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
