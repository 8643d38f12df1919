"""The memory-saving methods that `peers.py` compares, and how one of them trains a network in a process of its own.

`METHODS` is the whole list. The peers of xconv are what a user of torch can switch on today: Inductor as it is, its
partitioner's `activation_memory_budget`, `torch.utils.checkpoint` around the blocks of the network, and Inductor's fp8
quantisation of saved activations. None of them takes a budget in bytes, so they are run at a range of their own knobs.

A `Subject` is one network under one method, in a process of its own (worker.py). What is measured in it:

* the peak: allocator events of one step (`xconv_fx.measure.training_peak`): parameters, buffers and inputs, and what
  the step allocates on top of them, gradients included, class indices not;
* an independent check of it, from the operating system: the growth of the resident set over one step, from its
  high-water mark (`VmHWM`, reset through /proc/self/clear_refs). It sees what the allocator does not, such as oneDNN's
  scratchpads, Python objects and pages lost to fragmentation; it does not see pages that were never written, nor what
  libraries hold from one step to the next. glibc is told to map every block of 64 KiB or more on its own and to return
  what is free, so that memory freed earlier is not taken for memory in use. That slows a process down for good: nothing
  is timed after it. Linux with glibc only;
* gradients against plain autograd in float64 with the same parameters and batch;
* the first step, which compiles: after Inductor has compiled something trivial, with an empty cache directory and in a
  single process, so neither imports nor other methods' kernels are counted for or against it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from nets import PEER_NETS, PeerNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xconv_fx.measure import training_peak
from xconv_fx.plan.report import read_json

BUDGETS = (0.8, 0.6, 0.4, 0.2, 0.0)
SHARES = (90, 80, 70, 65, 60, 50, 40, 30, 20)
# Residuals below this many MiB stay as they are; torch's default of 100 would leave networks of this size alone.
FP8_SMALLEST = 0.1
# Gradients that differ by less than this between steps differ by rounding, not by draws.
ROUNDING = 1e-4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Method:
    """One way to train. `share` is xconv's budget in per cent of Inductor's peak, None: the lowest that is feasible.

    `exact` methods compute the gradient that autograd computes, up to rounding.
    """

    name: str
    family: str
    exact: bool = True
    compiled: bool = True
    blocks: bool = False
    torch_budget: float = 1.0
    share: int | None = None
    codecs: str = "all"


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("inductor", "inductor"),
        Method("eager", "eager", compiled=False),
        *(Method(f"budget{value:.1f}", "torch budget", torch_budget=value) for value in BUDGETS),
        Method("checkpoint", "checkpoint", compiled=False, blocks=True),
        Method("checkpoint+inductor", "checkpoint", blocks=True),
        Method("fp8", "fp8", exact=False),
        *(Method(f"xconv{share}", "xconv", exact=False, share=share) for share in SHARES),
        Method("xconv-lowest", "xconv", exact=False),
        Method("xconv-exact", "xconv", codecs="exact"),
    )
}
# Run last, at the peak of the exact peer that turned out lowest.
AT_PEER = Method("xconv@peer", "xconv", exact=False)


@dataclass(frozen=True)
class GradientError:
    """How far `draws` gradients are from the exact one, tensor by tensor in relative L2 norm.

    `one` is the error of a single draw (root mean square over the draws), `mean` that of the mean of all draws; both
    are medians over the weights of convolutions. `bias` is the second over what noise alone would leave of the first,
    one / sqrt(draws), as a median over the weights whose error is well above rounding's, that of plain autograd in
    float32: 1 when the draws are unbiased and independent, sqrt(draws) when they are all wrong in the same way. None
    when there is no such weight.
    `whole` is the error of all parameters as one vector, in the first draw.
    """

    one: float
    whole: float
    mean: float
    bias: float | None
    draws: int


class Checkpointed(nn.Module):
    """A block of which only the inputs are kept for the backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self.block, *inputs, use_reentrant=False))


def checkpoint_blocks(model: nn.Module, pattern: str) -> None:
    """Wrap the modules whose full names match; parameters keep their order, not their names."""
    for name in [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]:
        path, _, last = name.rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, last, Checkpointed(parent.get_submodule(last)))


def configure(method: Method) -> None:
    """Switch on what is not an argument of `torch.compile`. The process trains by this method only."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    functorch.activation_memory_budget = method.torch_budget
    if method.family == "fp8":
        inductor.post_grad_fusion_options["activation_quantization_aten_pass"] = {
            "quant_type": "torch.float8_e5m2",
            "allowed_dtypes": "torch.float32",
            "size_in_mb": FP8_SMALLEST,
            # Forward and backward have different defaults.
            "use_scaling": True,
            "exclude_primals": True,
        }


class Subject:
    """A freshly built network with its batch, under a method; compiled by its first step. `budget` in bytes is xconv's.

    Every network is built from the same random state, so all methods of one network start from the same parameters.
    """

    def __init__(
        self, net: PeerNet, method: Method, budget: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        self.net = net
        self.model = net.build().to(dtype)
        self.inputs, self.target = net.batch(dtype=dtype)
        if method.blocks:
            checkpoint_blocks(self.model, net.blocks)
        self.run: Callable[..., Any] = self.model
        if method.family == "xconv":
            # Removed with the process's other files.
            self.report = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "plan.json"
            options: dict[str, Any] = {"mem_budget": budget, "codecs": method.codecs, "report": str(self.report)}
            self.run = torch.compile(self.model, backend="xconv", options=options)
        elif method.compiled:
            configure(method)
            self.run = torch.compile(self.model)

    def loss(self, output: Tensor) -> Tensor:
        return self.net.loss(output, self.target)

    def step(self) -> float:
        """Seconds of one forward and backward from empty gradients."""
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        self.loss(self.run(self.inputs)).backward()
        return time.perf_counter() - start

    def peak(self) -> tuple[int, int]:
        """Bytes of the step's physical peak, and of what was there before it."""
        peak = training_peak(cast(nn.Module, self.run), self.inputs, self.loss)
        return peak.bytes, peak.resident

    def predictions(self) -> dict[str, Any]:
        """What xconv's plan says of its one graph: see `xconv_fx.plan.Plan` for the names."""
        (plan,) = read_json(self.report)
        names = ("foreseen", "audited_peak", "time", "attempts", "slices", "held_slices", "saved_share", "noise")
        return {name: getattr(plan, name) for name in names}

    def gradients(self) -> list[Tensor | None]:
        """Gradients in float64, in the order of the parameters."""
        self.step()
        return [None if p.grad is None else p.grad.double() for p in self.model.parameters()]

    def convolutions(self) -> list[bool]:
        """Which of the parameters are weights of convolutions."""
        kind = nn.modules.conv._ConvNd
        weights = {id(module.weight) for module in self.model.modules() if isinstance(module, kind)}
        return [id(p) in weights for p in self.model.parameters()]

    def first_step(self) -> tuple[float, float]:
        """Seconds of a step, on the clock and of processor time, the C++ compiler's included."""
        before = os.times()
        seconds = self.step()
        return seconds, sum(os.times()[:4]) - sum(before[:4])

    def save_gradients(self, path: str) -> None:
        """Write the gradients of this network, and of the same one in float32 under plain autograd."""
        torch.save((self.gradients(), Subject(self.net, METHODS["eager"]).gradients()), path)

    def gradient_error(self, path: str, draws: int) -> GradientError:
        """Against the gradients saved at `path`. Two draws that agree end the drawing: there is no noise to average."""
        true, single = torch.load(path)
        places = [place for place, conv in enumerate(self.convolutions()) if conv and true[place] is not None]
        norms = [float(true[place].norm()) for place in places]
        first = self.gradients()
        whole = _distance(first, true)
        sums = [first[place] - true[place] for place in places]
        squares = [(float(error.norm()) / norm) ** 2 for error, norm in zip(sums, norms, strict=True)]
        spread, done = 0.0, 1
        while done < max(2, draws):
            errors = [grad - true[place] for place, grad in enumerate(self.gradients()) if place in places]
            done += 1
            if done == 2:
                spread = max(float((a - b).norm()) / n for a, b, n in zip(sums, errors, norms, strict=True))
            for at, error in enumerate(errors):
                sums[at] += error
                squares[at] += (float(error.norm()) / norms[at]) ** 2
            if spread < ROUNDING:
                break
        one = [(square / done) ** 0.5 for square in squares]
        mean = [float(total.norm()) / done / norm for total, norm in zip(sums, norms, strict=True)]
        rounding = [float((single[place] - true[place]).norm()) / n for place, n in zip(places, norms, strict=True)]
        # Rounding is the same in every draw: where noise is not far above it, the mean shows rounding.
        floors = [2 * max(2, draws) ** 0.5 * error for error in rounding]
        bias = [m / o * done**0.5 for m, o, floor in zip(mean, one, floors, strict=True) if o > floor]
        if bias and spread < ROUNDING:
            # All the draws that were asked for would have been the same.
            bias = [max(2, draws) ** 0.5]
        return GradientError(_median(one), whole, _median(mean), _median(bias) if bias else None, done)

    def resident_growth(self) -> int | None:
        """Bytes by which the resident set grows over a step at most; None where the system cannot tell.

        Slows down everything that the process does later.
        """
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_THRESHOLD, 64 << 10)
            libc.mallopt(M_TRIM_THRESHOLD, 0)
            self.step()
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        before = _status("VmRSS")
        self.step()
        return _status("VmHWM") - before


def _distance(found: list[Tensor | None], true: list[Tensor | None]) -> float:
    """Relative L2 distance of all tensors as one vector."""
    pairs = [(f, t) for f, t in zip(found, true, strict=True) if f is not None and t is not None]
    off = sum(float((f - t).square().sum()) for f, t in pairs)
    return (off / sum(float(t.square().sum()) for _, t in pairs)) ** 0.5


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def _status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    found = re.search(rf"^{key}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found.group(1)) * 1024


def tiny(net: PeerNet) -> PeerNet:
    """The network with the smallest batch that still trains: for checking that everything runs."""
    channels, space = net.input_shape[1], net.input_shape[2:]
    return dataclasses.replace(net, input_shape=(2, channels, *([64] if len(space) == 2 else [16]) * len(space)))


__all__ = ["AT_PEER", "METHODS", "PEER_NETS", "GradientError", "Method", "Subject", "tiny"]
