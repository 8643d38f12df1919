"""A torch.compile backend that trains convolutional networks inside a physical memory budget.

What is imported from here besides the backend is loaded when it is first asked for: `import xconv_fx` imports no torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from .moved import MovedFinder

if TYPE_CHECKING:
    from xconv_fx import nn as nn
    from xconv_fx.nn.convert import convert as convert
    from xconv_fx.nn.convert import plan_and_convert as plan_and_convert
    from xconv_fx.nn.substitute import substitute as substitute
    from xconv_fx.noise.calibrate import calibrate as calibrate
    from xconv_fx.noise.gradient_check import gradient_check as gradient_check
    from xconv_fx.ops.sample_gradients import SampleGradients as SampleGradients
    from xconv_fx.options.statistics import Statistics as Statistics
    from xconv_fx.step.front_door import compile as compile
    from xconv_fx.step.front_door import plans as plans
    from xconv_fx.step.front_door import report as report

__version__ = "0.1.0"

# Public names to the modules that define them.
_HOMES = {
    "SampleGradients": "ops.sample_gradients",
    "Statistics": "options.statistics",
    "calibrate": "noise.calibrate",
    "compile": "step.front_door",
    "convert": "nn.convert",
    "gradient_check": "noise.gradient_check",
    "plan_and_convert": "nn.convert",
    "plans": "step.front_door",
    "report": "step.front_door",
    "substitute": "nn.substitute",
}
# Modules with public names of their own, which need not be imported to be used.
_MODULES = ("errors", "measure", "nn", "testing")

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
    """`xconv_fx.report` is the function also when a module is imported by that name, which was its name once."""

    def __setattr__(self, name: str, value: Any) -> None:
        # So imports bind a module to its package.
        if not (name == "report" and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
    sys.meta_path.append(MovedFinder())


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
