"""What is done about a torch whose minor version was not tested: looked at, tried once, and used or refused.

Private parts are looked at, and what they are called with (`hooks/private_parts.py`). Then a small network is compiled
and trained for a step in a process of its own (`trial.py`). What came of it is kept for this installation: versions of
torch and of Python, and sources of this package.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from xconv_fx import hooks
from xconv_fx.device import rates
from xconv_fx.errors import UnsupportedTorchError, UntestedTorchWarning
from xconv_fx.fingerprint import source_hash
from xconv_fx.hooks.version import SUPPORTED, TESTED
from xconv_fx.plan.log import log

# Set in the process of the trial, which would try itself.
TRIAL = "XCONV_FX_TRIAL"
# Seconds that a trial may take; it takes some twenty.
PATIENCE = 600


def require_usable_torch() -> None:
    """Raise `UnsupportedTorchError` on a torch on which this package does not work; warn once of one that is untested.

    The first call on a version that was not tested compiles a small network.
    """
    if hooks.is_tested() or os.environ.get(TRIAL) == "1":
        return
    if reason := _verdict(torch.__version__):
        raise UnsupportedTorchError(torch.__version__, SUPPORTED, reason)


@functools.cache
def _verdict(version: str) -> str:
    """Why this torch cannot be used; "" where it can, of which the user is told."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    place = rates.folder() / "torch" / f"{version}-{python}-{source_hash()[:16]}.json"
    try:
        reason = str(json.loads(place.read_text())["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        reason = found_wrong()
        _keep(place, reason)
    if not reason:
        warnings.warn(
            f"torch {version} was not tested (tested: {', '.join(TESTED)}), but has all that is needed, and a small "
            "network trained rightly and within its budget",
            UntestedTorchWarning,
            stacklevel=2,
        )
    return reason


def _keep(place: Path, reason: str) -> None:
    try:
        rates.write_whole(place, json.dumps({"reason": reason}))
    except OSError as error:
        log.debug("what was found of this torch is not kept: %s", error)


def found_wrong() -> str:
    """Why the installed torch cannot be used, found out anew; "" where it can."""
    if faults := hooks.probe():
        some = "; ".join(map(str, faults[:3]))
        return some if len(faults) <= 3 else f"{some}; and {len(faults) - 3} more"
    command = [sys.executable, "-W", "ignore", "-m", "xconv_fx.step.trial"]
    try:
        done = subprocess.run(command, env={**os.environ, TRIAL: "1"}, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"a small network was not trained within {PATIENCE} s"
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return f"a small network is not trained rightly: {''.join(last) or f'exit code {done.returncode}'}"
    return ""
