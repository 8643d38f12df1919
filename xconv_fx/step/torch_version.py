"""What is done about a torch whose minor version was not tested: looked at, tried once, and used or refused.

Private parts are looked at, and what they are called with (`hooks/private_parts.py`). Then a small network is compiled
and trained for a step in a process of its own, under a budget, and its gradients and its peak are compared with what
they should be. What came of it is kept for this installation: versions of torch and of Python, and sources of this
package.
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
SIZE = (8, 3, 32, 32)
BUDGET = "75%"
# How far the measured peak may be from the audited one.
CLOSE = 0.03
# By how much gradients may differ from eager ones, relative to their norm; Inductor's differ by 2e-4.
ROUNDING = 1e-3


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
    command = [sys.executable, "-W", "ignore", "-m", "xconv_fx.step.torch_version"]
    try:
        done = subprocess.run(command, env={**os.environ, TRIAL: "1"}, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"a small network was not trained within {PATIENCE} s"
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return f"a small network is not trained rightly: {''.join(last) or f'exit code {done.returncode}'}"
    return ""


def trial() -> None:
    """Train a step of a small network within a budget. Raises `AssertionError` where it is not as it should be."""
    from torch import nn

    import xconv_fx

    torch.manual_seed(0)
    inner = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *inner, nn.AdaptiveAvgPool2d(1))
    x = torch.randn(SIZE)
    net(x).square().mean().backward()
    expected = [parameter.grad for parameter in net.parameters()]
    net.zero_grad(set_to_none=True)
    compiled = torch.compile(net, backend="xconv", options={"mem_budget": BUDGET, "codecs": "exact"})
    compiled(x).square().mean().backward()
    found, exact = (torch.cat([value.flatten() for value in row if value is not None]) for row in (
        [parameter.grad for parameter in net.parameters()], expected
    ))  # fmt: skip
    error = float((found - exact).norm() / exact.norm())
    assert error <= ROUNDING, f"its gradients are off by {error:.1g}"

    (plan,) = xconv_fx.plans(compiled)
    assert plan.saved_after < plan.saved_before, "nothing is held in less memory"
    assert plan.audited_peak and plan.measured_peak, "the step was not measured"
    off = plan.measured_peak / plan.audited_peak - 1
    assert abs(off) <= CLOSE, f"its peak is {off:+.1%} off the audited one"


if __name__ == "__main__":
    trial()
