"""`xconv profile-machine`: measure what the roofline needs to know of this machine, and keep it for later plans.

Three kinds of measurement, each the median of several runs after one that warms up. A copy between two buffers larger
than most caches gives the bandwidth. Convolutions of 2D and 3D layers as networks have them, channels-last, give the
arithmetic: the geometric mean over the layers, forward and input gradient together and weight gradient apart, because
backends run the last at another rate. A kernel on one element gives the time to start one.

Layers are measured with batches that grow until a convolution takes long enough to be timed well: a fast machine is
measured with full batches, and one that computes 16-bit floats in software is done within seconds too.

Known gaps: kernels that Inductor generates are taken to be as fast as a copy. Whatever else the machine does meanwhile
is measured as well.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from xconv_fx.cost_model.device import DeviceSpec, device
from xconv_fx.cost_model.timing import conv_flops
from xconv_fx.device.rates import Machine, save, to_json
from xconv_fx.errors import UsageError

aten = torch.ops.aten

REPEATS = 5
# A measurement that takes longer than this is not repeated any more; a batch whose kernel takes longer does not grow.
PATIENCE, ENOUGH = 0.25, 0.02
BATCHES = {"cpu": (1, 4, 16), "cuda": (4, 16, 64)}
COPIED = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
STARTED = 1000


@dataclass(frozen=True)
class Layer:
    """A convolution with kernels of three in every dimension and as many output as input channels."""

    channels: int
    size: tuple[int, ...]

    def flops(self, batch: int) -> int:
        """Of its forward, and of either gradient."""
        return conv_flops(batch, self.channels, self.channels, (3,) * len(self.size), self.size)


LAYERS = (Layer(64, (56, 56)), Layer(128, (28, 28)), Layer(256, (14, 14)), Layer(32, (16, 16, 16)))


def profile(kind: str, threads: int | None = None, as_json: bool = False) -> None:
    """Measure "cpu" with so many threads (None: torch's own number), or "cuda"; keep the numbers and print them.

    Raises `UsageError` for a device that this machine does not have, and where nothing can be written.
    """
    if kind == "cuda":
        _require_cuda(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        machine = Machine.of(kind)
        with Console(stderr=True).status(f"measuring {machine.processor}"):
            measured = measure(kind)
    finally:
        torch.set_num_threads(before)
    try:
        path = save(machine, measured)
    except OSError as error:
        reason = f"cannot write {error.filename or machine.path}: {error.strerror}"
        raise UsageError(
            reason, "XCONV_FX_CACHE=DIR xconv profile-machine, with a directory that can be written"
        ) from error
    if as_json:
        print(to_json(machine, measured), end="")
        return
    console = Console()
    console.print(table(machine, measured))
    console.print(Text(f"Plans for this machine use these numbers from now on: {path}"), soft_wrap=True)


def _require_cuda(threads: int | None) -> None:
    if threads is not None:
        raise UsageError(
            "--threads is a number of CPU threads, which --device cuda does not use", "leave --threads out"
        )
    if not torch.cuda.is_available():
        reason = "sees no CUDA device" if torch.version.cuda else "is built without CUDA"
        hint = "--device cpu; or, where nvidia-smi lists a GPU, a build of torch for CUDA"
        raise UsageError(f"--device cuda: torch {torch.__version__} {reason}", hint)


def measure(kind: str) -> DeviceSpec:
    """The numbers of "cpu", with the threads that torch is set to, or of the current CUDA device; within seconds."""
    # Of a GPU that emulates bfloat16, programs use float16.
    native = kind == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    half = torch.bfloat16 if native else torch.float16
    flops32, weight32 = convolution_rates(kind, torch.float32)
    flops16, weight16 = convolution_rates(kind, half)
    return DeviceSpec(
        kind, bandwidth(kind), flops32, flops16, weight32, weight16, launch=start_time(kind), calibrated=True
    )


def bandwidth(kind: str) -> float:
    """Bytes a second of a large copy, read and written both counted."""
    source = torch.ones(COPIED[kind], dtype=torch.uint8, device=kind)
    target = torch.zeros_like(source)
    return 2 * COPIED[kind] / _median(lambda: target.copy_(source), kind)


def convolution_rates(kind: str, dtype: torch.dtype) -> tuple[float, float]:
    """flop/s of forwards and input gradients, and of weight gradients."""
    rates = [_layer_rates(layer, kind, dtype) for layer in LAYERS]
    either = itertools.chain.from_iterable((forward, grad_input) for forward, grad_input, _ in rates)
    return statistics.geometric_mean(either), statistics.geometric_mean(weight for *_, weight in rates)


def _layer_rates(layer: Layer, kind: str, dtype: torch.dtype) -> tuple[float, float, float]:
    """flop/s of forward, input gradient and weight gradient, each at the smallest batch that takes long enough."""

    def rate(call: Callable[[Tensor, Tensor, Tensor], object]) -> float:
        for batch in BATCHES[kind]:
            tensors = _operands(layer, batch, kind, dtype)
            seconds = _median(lambda tensors=tensors: call(*tensors), kind)  # type: ignore[misc]
            if seconds > ENOUGH:
                break
        return layer.flops(batch) / seconds

    return rate(_forward), rate(_input_gradient), rate(_weight_gradient)


def _operands(layer: Layer, batch: int, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random input, weight and output gradient, channels-last."""
    layout = torch.channels_last if len(layer.size) == 2 else torch.channels_last_3d
    x = torch.rand(batch, layer.channels, *layer.size, device=kind, dtype=dtype)
    weight = torch.rand(layer.channels, layer.channels, *(3 for _ in layer.size), device=kind, dtype=dtype)
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    return x, weight, torch.rand_like(x)


def _forward(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    ones = [1] * (x.dim() - 2)
    return aten.convolution(x, weight, None, ones, ones, ones, False, [0] * len(ones), 1)


def _input_gradient(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    return _backward(x, weight, grad, [True, False, False])


def _weight_gradient(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    return _backward(x, weight, grad, [False, True, False])


def _backward(x: Tensor, weight: Tensor, grad: Tensor, wanted: list[bool]) -> Tensor:
    ones = [1] * (x.dim() - 2)
    return aten.convolution_backward(grad, x, weight, None, ones, ones, ones, False, [0] * len(ones), 1, wanted)


def start_time(kind: str) -> float:
    """Seconds to start a kernel, many of them in a row."""
    one = torch.zeros(1, device=kind)

    def many() -> None:
        for _ in range(STARTED):
            one.add_(1)

    return _median(many, kind) / STARTED


def _median(call: Callable[[], object], kind: str) -> float:
    """Seconds of `call`: the median of `REPEATS` runs after a first one, or of as many as `PATIENCE` lasts for."""
    _timed(call, kind)
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < PATIENCE:
        times.append(_timed(call, kind))
    return statistics.median(times)


def _timed(call: Callable[[], object], kind: str) -> float:
    _wait(kind)
    start = time.perf_counter()
    call()
    _wait(kind)
    return time.perf_counter() - start


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


ROWS = (
    ("copy", "bandwidth", 1e9, "GB/s"),
    ("float32 convolutions", "flops32", 1e9, "Gflop/s"),
    ("their weight gradients", "weight32", 1e9, "Gflop/s"),
    ("16-bit convolutions", "flops16", 1e9, "Gflop/s"),
    ("their weight gradients", "weight16", 1e9, "Gflop/s"),
    ("start of a kernel", "launch", 1e-6, "us"),
)


def table(machine: Machine, measured: DeviceSpec) -> Table:
    """What was measured next to the generic numbers."""
    generic = device(machine.device)
    threads = "" if machine.threads is None else f", {machine.threads} thread" + ("" if machine.threads == 1 else "s")
    shown = Table(title=f"{machine.processor}{threads}", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    shown.add_column("")
    for heading in ("measured", "generic"):
        shown.add_column(heading, justify="right")
    shown.add_column("")
    for label, field, scale, unit in ROWS:
        numbers = (f"{getattr(spec, field) / scale:#.3g}".rstrip(".") for spec in (measured, generic))
        shown.add_row(label, *numbers, unit)
    return shown
