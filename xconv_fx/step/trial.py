"""A small network trained for one step within a budget, and held against plain autograd: does it work here?

`xconv doctor` asks for every device that is there, and a torch that was not tested is tried so before it is used, in a
process of its own (`python -m xconv_fx.step.trial`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIZE = (8, 3, 32, 32)
BUDGET = "75%"
# How far the measured peak may be from the audited one.
CLOSE = 0.03
# By how much gradients may differ from eager ones, relative to their norm; Inductor's differ by 2e-4.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Trial:
    """What a step came to: the relative error of its gradients, and bytes.

    Saved are those between forward and backward, without a plan and with it.
    """

    error: float
    saved_before: int
    saved_after: int
    audited: int
    measured: int

    @property
    def off(self) -> float:
        """By what part the measured peak is above the audited one."""
        return self.measured / self.audited - 1

    def wrong(self) -> str:
        """What is wrong with the step; "" where it is as it should be."""
        if not self.error <= ROUNDING:
            return f"its gradients are off by {self.error:.1g}"
        if self.saved_after >= self.saved_before:
            return "nothing is held in less memory"
        if not (self.audited and self.measured):
            return "the step was not measured"
        return self.wrong_peak()

    def wrong_peak(self) -> str:
        """What is wrong with the memory that it took."""
        return f"its peak is {self.off:+.1%} off the audited one" if abs(self.off) > CLOSE else ""


def train_a_step(device: str = "cpu") -> Trial:
    """Train a step on "cpu" or "cuda", in single precision without TF32. Raises what compiling raises."""
    import xconv_fx

    torch.compiler.reset()
    with torch.random.fork_rng(), torch.backends.cudnn.flags(allow_tf32=False):
        torch.manual_seed(0)
        net, x = _net().to(device), torch.randn(SIZE).to(device)
        exact = _gradients(net, net, x)
        compiled = torch.compile(net, backend="xconv", options={"mem_budget": BUDGET, "codecs": "exact"})
        found = _gradients(net, compiled, x)
        _gradients(net, compiled, x)  # On CUDA it is the second step that is measured.
    (plan,) = xconv_fx.plans(compiled)
    error = float((found - exact).norm() / exact.norm())
    return Trial(error, plan.saved_before, plan.saved_after, plan.audited_peak or 0, plan.measured_peak or 0)


def _net() -> nn.Module:
    """A network whose residuals are its peak."""
    inner = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *inner, nn.AdaptiveAvgPool2d(1))


def _gradients(net: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """All gradients in a row; leaves none behind."""
    call(x).square().mean().backward()
    row = torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])
    net.zero_grad(set_to_none=True)
    return row


if __name__ == "__main__":
    if reason := train_a_step().wrong():
        raise SystemExit(reason)
