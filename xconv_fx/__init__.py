"""A torch.compile backend that trains convolutional networks inside a physical memory budget.

What is imported from here besides the backend is loaded when it is first asked for: `import xconv_fx` imports no torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xconv_fx import nn as nn
    from xconv_fx.conversion import convert as convert
    from xconv_fx.conversion import plan_and_convert as plan_and_convert
    from xconv_fx.front_door import compile as compile
    from xconv_fx.front_door import plans as plans
    from xconv_fx.front_door import report as report
    from xconv_fx.gradient_noise import gradient_check as gradient_check
    from xconv_fx.model_calibration import calibrate as calibrate
    from xconv_fx.sample_gradients import SampleGradients as SampleGradients
    from xconv_fx.statistics import Statistics as Statistics
    from xconv_fx.substitution import substitute as substitute

__version__ = "0.1.0"

# Public names to the modules that define them. A module of the same name would hide the function once it is imported,
# but for `report` (below).
_HOMES = {
    "SampleGradients": "sample_gradients",
    "Statistics": "statistics",
    "calibrate": "model_calibration",
    "compile": "front_door",
    "convert": "conversion",
    "gradient_check": "gradient_noise",
    "plan_and_convert": "conversion",
    "plans": "front_door",
    "report": "front_door",
    "substitute": "substitution",
}
_MODULES = ("nn",)

__all__ = [
    "SampleGradients",
    "Statistics",
    "__version__",
    "calibrate",
    "compile",
    "convert",
    "gradient_check",
    "nn",
    "plan_and_convert",
    "plans",
    "report",
    "substitute",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(types.ModuleType):
    """`xconv_fx.report` is the function also when the module of that name, `xconv_fx.report`, is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        # So imports bind a module to its package.
        if not (name == "report" and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
