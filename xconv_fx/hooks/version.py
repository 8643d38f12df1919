"""The versions of torch that the private interfaces in this package were tested on."""

from __future__ import annotations

import torch

# Minor versions on one patch of which the whole suite passed.
TESTED = ("2.13",)
SUPPORTED = ">=2.13,<2.14"


def is_tested() -> bool:
    """Whether the installed torch is of a minor version that was tested, whatever its patch."""
    return ".".join(torch.__version__.split("+")[0].split(".")[:2]) in TESTED
