"""Draws that operators of a higher order make, or that come with further results, beside eager PyTorch's same draws."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers.compiled import Compile
from helpers.torch_versions import needs_eager_rrelu
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Inductor draws as ATen does.
AS_EAGER: dict[str, Any] = {"slices": 1, "seed": 0, "inductor": {"fallback_random": True}}


class Checkpointed(nn.Module):
    """The user's own checkpoint, which draws: AOTAutograd keeps the generator's state for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def part(self, x: Tensor) -> Tensor:
        return self.first(F.alpha_dropout(x, 0.2, True)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.part, x, use_reentrant=False))


class Leaky(nn.Module):
    """One operator gives the result and the slopes that it drew; both are read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.rrelu(F.avg_pool2d(F.gelu(self.first(x)), 3, 1), training=True)


def trained(call: Any, net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    given = x.clone().requires_grad_()
    torch.manual_seed(1)
    call(given).square().mean().backward()
    assert given.grad is not None
    return [given.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


def test_draws_of_a_checkpoint_are_audited_and_made_again_alike(compile_model: Compile) -> None:
    net, x = Checkpointed(), torch.randn(4, 3, 24, 24)
    compiled = compile_model(copy.deepcopy(net), mem_budget="100%", codecs="exact", **AS_EAGER)
    for found, wanted in zip(trained(compiled, compiled.model, x), trained(net, net, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert compiled.plan.audited_peak is not None and compiled.plan.measured_peak is not None
    assert compiled.plan.measured_peak <= compiled.plan.audited_peak


@needs_eager_rrelu
def test_a_draw_with_several_results_is_made_once(compile_model: Compile) -> None:
    net, x = Leaky(), torch.randn(4, 3, 24, 24)
    compiled = compile_model(copy.deepcopy(net), mem_budget="95%", codecs="exact", **AS_EAGER)
    for found, wanted in zip(trained(compiled, compiled.model, x), trained(net, net, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
