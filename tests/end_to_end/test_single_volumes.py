"""A batch of two volumes in slices of one, where ATen would unfold each: exact gradients within the budget."""

from __future__ import annotations

import torch
from helpers.compiled import Compile
from helpers.nets import gradients
from torch import Tensor, nn
from torch.profiler import profile

from xconv_fx.measure import training_peak


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv3d(8, 16, 3, padding=1),
            nn.InstanceNorm3d(16, affine=True),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv3d(16, 16, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose3d(16, 4, 2, stride=2),
        )


def volumes() -> Tensor:
    return torch.randn(2, 8, 24, 24, 24, generator=torch.Generator().manual_seed(1))


def test_single_volumes_are_not_unfolded(compile_model: Compile):
    torch._dynamo.reset()
    model, x = net(), volumes()
    expected = gradients(model, x)
    plain = training_peak(model, x, lambda output: output.mean())
    compiled = compile_model(model, mem_budget="70%", codecs="exact", slices=2)
    gradients(compiled.model, x)
    with profile() as profiled:
        found = gradients(compiled.model, x)
    for name, gradient in expected.items():
        limit = 1e-4 * max(gradient.norm().item(), 1e-3)
        assert (found[name] - gradient).norm() <= limit, name
    calls = {event.key: event.count for event in profiled.key_averages()}
    assert calls["xconv::single_convolution"] >= 2 * 2, "a forward convolution and an input gradient in each slice"
    assert calls["xconv::volume_weight_gradient"] >= 2 * 2
    peak = training_peak(compiled.model, x, lambda output: output.mean(), warmup=0)
    assert peak.bytes <= compiled.plans[-1].budget < plain.bytes
