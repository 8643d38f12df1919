"""Codecs: what is held between forward and backward instead of a tensor.

Importing this package defines the operators `torch.ops.xconv.*` and fills the table of codecs. Every operator has an
eager reference and a fake rule; `lowering.install` adds generated kernels for Inductor, without which a compiled
graph calls the eager reference.
"""

from . import conv3d, interpolate, materialize, pool, seed  # noqa: F401 (operators that no codec's module defines)
from .bitmask import BITMASK
from .cached_code import tag_cached_code
from .codec import Codec, SavedAs, codec_of, names, register
from .fixed import FIXED
from .fold import PROBE
from .layout import fitting_probes, order_of
from .quantize_codec import QUANTIZE

__all__ = [
    "BITMASK",
    "FIXED",
    "PROBE",
    "QUANTIZE",
    "Codec",
    "SavedAs",
    "codec_of",
    "fitting_probes",
    "names",
    "order_of",
    "register",
]

tag_cached_code()
