"""How one method of `peers.py` trains a network, in a process of its own (harness/worker.py). What is measured in it:

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

import gc
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import malloc
from harness.errors import Errors
from harness.gradients import GradientError, gradient_error
from harness.subject import Subject
from nets import PeerNet
from peers_methods import Method, checkpoint_blocks, configure
from torch import Tensor, nn

# Gradients that differ by less than this between steps differ by rounding, not by draws.
ROUNDING = 1e-4
PREDICTED = ("foreseen", "audited_peak", "time", "attempts", "slices", "held_slices", "saved_share", "noise")


@dataclass(frozen=True)
class GradientNoise:
    """How far `draws` gradients are from the exact one: the `first` of them, and weights of convolutions in all.

    `one` is the relative L2 error of a single draw (root mean square over the draws), `mean` that of the mean of all
    draws; both are medians over the weights. `bias` is the second over what noise alone would leave of the first,
    one / sqrt(draws), as a median over the weights whose error is well above rounding's, that of plain autograd in
    float32: 1 when the draws are unbiased and independent, sqrt(draws) when they are all wrong in the same way. None
    when there is no such weight.
    """

    first: GradientError
    one: float
    mean: float
    bias: float | None
    draws: int


class Peer(Subject):
    """A network under a method; compiled by its first step. `budget` in bytes is xconv's."""

    def __init__(
        self, net: PeerNet, method: Method, budget: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(net, dtype)
        if method.blocks:
            checkpoint_blocks(self.model, net.blocks)
        if method.family == "xconv":
            self.compile({"mem_budget": budget, "codecs": method.codecs})
        elif method.compiled:
            configure(method)
            self.compile()

    def first_step(self) -> tuple[float, float]:
        """Seconds of a step, on the clock and of processor time, the C++ compiler's included."""
        before = os.times()
        seconds = self.step()
        return seconds, sum(os.times()[:4]) - sum(before[:4])

    def predictions(self) -> dict[str, Any]:
        """What xconv's plan says of its one graph: see `xconv_fx.plan.Plan` for the names."""
        (plan,) = self.plans
        return {name: getattr(plan, name) for name in PREDICTED}

    def convolutions(self) -> list[str]:
        """The parameters that are weights of convolutions."""
        kind = nn.modules.conv._ConvNd
        weights = {id(module.weight) for module in self.model.modules() if isinstance(module, kind)}
        return [name for name, p in self.parameters.items() if id(p) in weights]

    def save_gradients(self, path: str) -> None:
        """Write the gradients of this network, and of the same one in float32 under plain autograd."""
        torch.save((self.gradients(), Subject(self.net).gradients()), path)

    def gradient_noise(self, path: str, draws: int) -> GradientNoise:
        """Against the gradients saved at `path`."""
        true, single = torch.load(path)
        weights = [name for name in self.convolutions() if name in true]
        return gradient_noise(self.gradients, true, single, weights, max(2, draws))

    def resident_growth(self) -> int | None:
        """Bytes by which the resident set grows over a step at most; None where the system cannot tell.

        Slows down everything that the process does later.
        """
        try:
            malloc.map_every_block()
            self.step()
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            malloc.return_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        before = _status("VmRSS")
        self.step()
        return _status("VmHWM") - before


def gradient_noise(
    draw: Callable[[], Mapping[str, Tensor]],
    true: Mapping[str, Tensor],
    single: Mapping[str, Tensor],
    weights: Sequence[str],
    draws: int,
) -> GradientNoise:
    """Of draws of these weights' gradients; `single` is autograd's in float32.

    Two draws that agree end the drawing: there is no noise to average.
    """
    first, second = draw(), draw()
    spread = max(float((first[name] - second[name]).norm() / true[name].norm()) for name in weights)
    noisy = spread >= ROUNDING
    errors = {name: Errors(true[name]) for name in weights}
    for drawn in itertools.chain((first, second), (draw() for _ in range(draws - 2 if noisy else 0))):
        for name, seen in errors.items():
            seen.add(drawn[name])
    bias = None
    # Rounding is the same in every draw: where noise is not far above it, the mean shows rounding.
    if above := [seen for name, seen in errors.items() if seen.one > 2 * draws**0.5 * _rounding(true, single, name)]:
        # All the draws that were asked for would have been the same without noise.
        bias = _median([seen.mean / seen.one * seen.draws**0.5 for seen in above]) if noisy else draws**0.5
    return GradientNoise(
        first=gradient_error(first, true),
        one=_median([seen.one for seen in errors.values()]),
        mean=_median([seen.mean for seen in errors.values()]),
        bias=bias,
        draws=next(iter(errors.values())).draws,
    )


def _rounding(true: Mapping[str, Tensor], single: Mapping[str, Tensor], name: str) -> float:
    return float((single[name] - true[name]).norm() / true[name].norm())


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def _status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    found = re.search(rf"^{key}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found.group(1)) * 1024
