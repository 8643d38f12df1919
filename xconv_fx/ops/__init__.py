"""Codecs: what is held between forward and backward instead of a tensor.

Importing this package defines the operators `torch.ops.xconv.*` and fills the table of codecs. Every operator has an
eager reference and a fake rule; `lowering.install` adds generated kernels for Inductor, without which a compiled
graph calls the eager reference.
"""

from . import pool, seed, stored, volume  # noqa: F401 (operators that no codec's module defines)
from .bitmask import BITMASK
from .codes import QUANTIZE
from .fixed import FIXED
from .fold import PROBE
from .layout import fitting_probes, order_of
from .registry import Codec, Held, codec, names, register

__all__ = [
    "BITMASK",
    "FIXED",
    "PROBE",
    "QUANTIZE",
    "Codec",
    "Held",
    "codec",
    "fitting_probes",
    "names",
    "order_of",
    "register",
]
