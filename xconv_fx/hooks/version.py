"""The versions of torch that the private interfaces in this package were checked on."""

from __future__ import annotations

import torch

from xconv_fx.errors import UnsupportedTorchError

CHECKED = ("2.13.0",)


def require_checked_torch() -> None:
    """Raise `UnsupportedTorchError` unless the installed torch is one that the private hooks were checked on."""
    found = torch.__version__
    if found.split("+")[0] not in CHECKED:
        raise UnsupportedTorchError(
            found, f"=={CHECKED[-1]}", f"private hooks of its compiler were checked on {', '.join(CHECKED)}"
        )
