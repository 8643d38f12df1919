"""The roofline's numbers of this machine: measured by `xconv profile-machine`, kept in a file, looked up when planning.

A file belongs to a device type, a processor, a number of threads and a version of torch; any other combination is
planned with the generic numbers of `cost_model/device.py`. So is one whose file cannot be read or makes no sense, after
a warning: a cache never fails a training run.

Known gap: processors are told apart by name and instruction set. Virtual machines of one name can have different
shares of a host, and a machine that was busy while it was measured stays slow until it is measured again.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xconv_fx.cost_model.device import DEVICES, RATES, DeviceSpec, device
from xconv_fx.plan.log import log
from xconv_fx.reproducible import is_portable

FORMAT = 1
MEASURED = (*RATES, "launch")
_assumed: contextvars.ContextVar[DeviceSpec | None] = contextvars.ContextVar("assumed", default=None)


@dataclass(frozen=True)
class Machine:
    """What a calibration is valid for. `threads` is None for a GPU, whose kernels do not depend on it."""

    device: str
    processor: str
    threads: int | None
    torch: str

    @staticmethod
    def of(name: str) -> Machine:
        """The machine at hand, for a device such as "cpu" or "cuda:1" that it has, as torch is set now."""
        kind = name.partition(":")[0]
        if kind == "cuda":
            return Machine(kind, torch.cuda.get_device_name(name), None, torch.__version__)
        return Machine(kind, _processor(), torch.get_num_threads(), torch.__version__)

    @property
    def path(self) -> Path:
        """Where its calibration is kept."""
        threads = [] if self.threads is None else [f"{self.threads}-threads"]
        name = "-".join([self.device, self.processor, *threads, "torch", self.torch])
        return folder() / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.json"


def folder() -> Path:
    """The cache's directory: $XCONV_FX_CACHE, else xconv-fx in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("XCONV_FX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "xconv-fx"


def keeps_findings() -> bool:
    """Whether plans, and what library calls allocate, are kept in the cache: unless XCONV_FX_PLAN_CACHE=0."""
    return os.environ.get("XCONV_FX_PLAN_CACHE", "1") != "0"


def spec(name: str) -> DeviceSpec:
    """The calibrated numbers of a device, or the generic ones, as always in plans for no machine in particular.

    Those of a device that is `assumed` stand for all of its type. Raises `ValueError` for a device that has neither.
    """
    generic = device(name)
    if (assumption := _assumed.get()) is not None and assumption.name == generic.name:
        return assumption
    if is_portable() or (generic.name == "cuda" and not torch.cuda.is_available()):
        return generic
    return load(Machine.of(name)) or generic


@contextlib.contextmanager
def assumed(numbers: DeviceSpec) -> Iterator[None]:
    """Plan for a device that need not be there: `numbers` are those of every device of its type."""
    token = _assumed.set(numbers)
    try:
        yield
    finally:
        _assumed.reset(token)


def specs(values: Iterable[Any]) -> tuple[DeviceSpec, ...]:
    """The numbers of all devices that hold the tensors among `values`: what a plan of them depends on."""
    names = {str(value.device) for value in values if isinstance(value, torch.Tensor) and value.device.type in DEVICES}
    return tuple(spec(name) for name in sorted(names))


def save(machine: Machine, measured: DeviceSpec) -> Path:
    """Write what was measured, in place of what was there; the file's path. Raises `OSError`."""
    write_whole(machine.path, to_json(machine, measured))
    return machine.path


def write_whole(path: Path, text: str) -> None:
    """Write a file of the cache, in place of what was there, and its folder. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: a training run that starts meanwhile must not read half a file.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


def to_json(machine: Machine, measured: DeviceSpec) -> str:
    """What `save` writes: rates in bytes/s and flop/s, `launch` in seconds."""
    numbers = {field: getattr(measured, field) for field in MEASURED}
    data = {"format": FORMAT, "machine": dataclasses.asdict(machine), "measured": numbers}
    return json.dumps(data, indent=2) + "\n"


def load(machine: Machine) -> DeviceSpec | None:
    """The calibration of `machine`; None without a valid one."""
    path = machine.path
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError:
        return _read(path, machine, None)
    return _read(path, machine, (found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=64)
def _read(path: Path, machine: Machine, version: tuple[int, int] | None) -> DeviceSpec | None:
    """Read a file once a `version` of it: one compilation asks many times, and should warn once."""
    try:
        return _parse(path.read_text(encoding="utf-8"), machine)
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning(
            "planning with generic rates, because %s is no calibration (%s). Try: xconv profile-machine", path, reason
        )
        return None


def _parse(text: str, machine: Machine) -> DeviceSpec:
    """Inverse of `to_json`. Raises what `_read` catches."""
    data = json.loads(text)
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r} is not {FORMAT}")
    if (found := Machine(**data["machine"])) != machine:
        raise ValueError(f"it is of another machine, {found}")
    numbers = {field: float(data["measured"][field]) for field in MEASURED}
    return DeviceSpec(machine.device, **numbers, calibrated=True)


@functools.cache
def _processor() -> str:
    """Name and instruction set of the CPU."""
    name = platform.processor() or platform.machine()
    try:
        # x86 only: elsewhere the file has no such line. `platform` gives no more than "x86_64" on Linux.
        models = re.findall(r"^model name\s*:\s*(.+?)\s*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return f"{models[0] if models else name} {torch.backends.cpu.get_cpu_capability()}"
