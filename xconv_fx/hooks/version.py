"""The versions of torch that the private interfaces in this package were tested on."""

from __future__ import annotations

import torch

# Minor versions on one patch of which the whole suite ran, and passed but for what README names. Others may be let in.
TESTED = ("2.12", "2.13", "2.14")
SUPPORTED = ">=2.12,<2.16"


def is_tested() -> bool:
    """Whether the installed torch is of a minor version that was tested, whatever its patch."""
    return ".".join(map(str, minor(torch.__version__))) in TESTED


def minor(version: str) -> tuple[int, int]:
    """`(2, 13)` of "2.13", "2.13.1+cu130" or "2.13.0a0+git123"."""
    first, second = version.split("+")[0].split(".")[:2]
    return int(first), int(second)
