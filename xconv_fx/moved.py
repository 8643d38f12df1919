"""Modules that have moved: their former names still import, as the modules they are now, with a deprecation warning."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

# Former names to present ones, of what users import.
MOVED = {
    "xconv_fx.allocations": "xconv_fx.measure.origins",
    "xconv_fx.backend": "xconv_fx.step.backend",
    "xconv_fx.bench": "xconv_fx.tools.bench",
    "xconv_fx.conversion": "xconv_fx.nn.convert",
    "xconv_fx.explain": "xconv_fx.step.explain",
    "xconv_fx.fit": "xconv_fx.tools.fit",
    "xconv_fx.front_door": "xconv_fx.step.front_door",
    "xconv_fx.gradient_noise": "xconv_fx.noise.gradient_check",
    "xconv_fx.model_calibration": "xconv_fx.noise.calibrate",
    "xconv_fx.report": "xconv_fx.plan.report",
    "xconv_fx.sample_gradients": "xconv_fx.ops.sample_gradients",
    "xconv_fx.scenario": "xconv_fx.device.scenario",
    "xconv_fx.sizes": "xconv_fx.options.budget",
    "xconv_fx.statistics": "xconv_fx.options.statistics",
    "xconv_fx.substitution": "xconv_fx.nn.substitute",
    "xconv_fx.sweep": "xconv_fx.tools.sweep",
    "xconv_fx.sweep.frontier": "xconv_fx.tools.sweep.frontier",
    "xconv_fx.workspace": "xconv_fx.device.workspace",
}


class MovedFinder(MetaPathFinder):
    """Finds modules under their former names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module that `name` was the name of; None for all others."""
        return ModuleSpec(name, _Moved()) if name in MOVED else None


class _Moved(Loader):
    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__
        new = MOVED[old]
        warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
        # What the import returns is what stands there.
        sys.modules[old] = importlib.import_module(new)
