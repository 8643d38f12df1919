"""What works here: versions, the private hooks, the C++ compiler, devices, and a plan and a training step to prove it.

Each check is a function that returns a `Finding`; one that raises is a finding as well, so that a broken installation
is described and not merely crashed into. Nothing here imports torch before a check needs it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xconv_fx import __version__

# What a finding says: it works; it works, with a restriction; it does not.
OK, NOTE, BROKEN = "ok", "note", "broken"
STYLES = {OK: "green", NOTE: "yellow", BROKEN: "bold red"}
OLDEST = (3, 10)
# A step exceeds this budget without a plan.
BUDGET = "80%"
SHAPE = (4, 3, 32, 32)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `status` is one of OK, NOTE and BROKEN, `fix` says what to type."""

    name: str
    status: str
    detail: str
    fix: str = ""


def examine(train: bool = True, debug: bool = False) -> list[Finding]:
    """All findings, in order; `train` includes the training step, which compiles for some seconds.

    With `debug`, the traceback of a check that raises is printed to stderr.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("torch", _torch),
        ("hooks", _hooks),
        ("backend", _backend),
        ("compiler", _compiler),
        ("caches", _caches),
        ("cuda", _cuda),
        ("rates", _rates),
        ("planning", _planning),
    ]
    for device in _devices() if train else ():
        checks.append((_name(device), functools.partial(_training, device)))
    return [_looked(name, check, debug) for name, check in checks]


def _devices() -> tuple[str, ...]:
    """What can be trained on here."""
    try:
        import torch

        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    except ImportError:
        return ("cpu",)


def _looked(name: str, check: Callable[[], Finding], debug: bool) -> Finding:
    try:
        return check()
    except Exception as error:
        if debug:
            traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        return Finding(name, BROKEN, f"{type(error).__name__}: {first}", "xconv doctor --debug")


def _python() -> Finding:
    detail = f"{platform.python_version()}, {platform.machine()}, xconv-fx {__version__}"
    if sys.version_info < OLDEST:
        return Finding("python", BROKEN, detail, f"Python {'.'.join(map(str, OLDEST))} or newer")
    return Finding("python", OK, detail)


def _torch() -> Finding:
    import torch

    parts = [torch.__version__, f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in this build"]
    parts += [f"{name} {importlib.metadata.version(name)}" for name in ("scipy", "numpy", "networkx")]
    return Finding("torch", OK, ", ".join(parts))


def _hooks() -> Finding:
    from xconv_fx import hooks
    from xconv_fx.hooks.version import SUPPORTED, TESTED

    faults = hooks.probe()
    if faults:
        detail = "; ".join(map(str, faults))
        return Finding("hooks", BROKEN, detail, f"pip install 'torch{SUPPORTED}'")
    number = len({private.path for private in hooks.needed()})
    detail = f"{number} private parts of torch are there and take what they are given"
    if hooks.is_tested():
        return Finding("hooks", OK, f"{detail}; tested on torch {', '.join(TESTED)}")
    return Finding("hooks", NOTE, f"{detail}, but this version was not tested", f"pip install 'torch=={TESTED[-1]}.*'")


def _backend() -> Finding:
    import torch

    if "xconv" not in torch.compiler.list_backends(exclude_tags=()):
        again = "pip install xconv-fx again: its entry points are missing"
        return Finding("backend", BROKEN, 'torch.compile(backend="xconv") is not registered', again)
    return Finding("backend", OK, 'torch.compile(backend="xconv") is registered')


def _compiler() -> Finding:
    from xconv_fx import hooks

    try:
        command = hooks.cpp_compiler()
    except Exception:
        fix = "install g++ or clang++, or set CXX to one"
        return Finding("compiler", BROKEN, "no C++ compiler: nothing can be trained on the CPU", fix)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <cmath>\nint main() { return static_cast<int>(std::floor(0.5)); }\n")
        done = subprocess.run([command, str(source), "-o", f"{folder}/probe"], capture_output=True, text=True)
    if done.returncode:
        first = (done.stderr.strip().splitlines() or ["no message"])[0]
        return Finding("compiler", BROKEN, f"{command} compiles nothing: {first}", "install the C++ standard library")
    return Finding("compiler", OK, f"{command} compiles")


def _caches() -> Finding:
    from xconv_fx import hooks
    from xconv_fx.device.rates import folder

    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or hooks.cache_folder()
    for path, variable in ((Path(compiled), "TORCHINDUCTOR_CACHE_DIR"), (folder(), "XCONV_FX_CACHE")):
        if not _writable(path):
            return Finding("caches", BROKEN, f"{path} cannot be written", f"{variable}=DIR with one that can")
    return Finding("caches", OK, f"kernels in {compiled}, calibrations in {folder()}")


def _writable(path: Path) -> bool:
    """Whether files can be written to the folder, or it can be made."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("cuda", NOTE, "no GPU: plans for CUDA can be made here, training on it cannot")
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Finding("cuda", BROKEN, f"{torch.cuda.get_device_name()}, but no Triton", "pip install triton")
    detail = f"{torch.cuda.get_device_name()}, Triton {triton}; no GPU was there when this version was made"
    return Finding("cuda", NOTE, detail, "xconv selftest --device cuda")


def _rates() -> Finding:
    import torch

    from xconv_fx.device.rates import spec

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if spec(kind).calibrated:
        return Finding("rates", OK, f"times are predicted with rates that were measured on this {kind}")
    return Finding("rates", NOTE, f"times are predicted for a generic {kind}", "xconv profile-machine")


def _planning() -> Finding:
    import torch
    from torch import nn

    from xconv_fx.step.explain import explain

    torch.compiler.reset()
    inner = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(16, 2, 1))
    (plan,) = explain(net, torch.zeros(SHAPE), mem_budget=BUDGET).plans
    held = ", ".join(sorted({choice.codec for choice in plan.choices}))
    return Finding("planning", OK, f"a small network has a plan at {BUDGET}: {held}")


def _training(device: str) -> Finding:
    from xconv_fx.step.trial import train_a_step

    name, trial = _name(device), train_a_step(device)
    reason = trial.wrong()
    # Scratch memory of a GPU's libraries is by a rule, which a small network shows; gradients have no such excuse.
    if reason and not (device == "cuda" and reason == trial.wrong_peak()):
        return Finding(name, BROKEN, f"a small network is not trained rightly: {reason}", "xconv selftest")
    detail = "a step within its budget has the gradients of PyTorch"
    if reason:
        return Finding(name, NOTE, f"{detail}, but {reason}", "xconv selftest")
    return Finding(name, OK, f"{detail}, and takes what was audited, {trial.off:+.1%}")


def _name(device: str) -> str:
    return "training" if device == "cpu" else f"training on {device}"


def render(findings: Iterable[Finding]) -> RenderableType:
    """The findings as a table, and what to type for those that have something."""
    findings = list(findings)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(finding.name, Text(finding.status, style=STYLES[finding.status]), Text(finding.detail))
    hints = [Text(f"{finding.name}: {finding.fix}") for finding in findings if finding.fix and finding.status != OK]
    return Group(table, *([Text("try:", style="bold"), *hints] if hints else []))
