"""Networks drawn at random: whatever is said to be separable has the batch's results and gradients in slices.

Their channels are as many as their samples, so that no size tells what it is; some of their layers mix samples. Steps
are run eagerly, in float64. The moments of sliced steps are held against a loop that counts what is alive.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from helpers.microbatches import run, step_of
from torch import nn

from xconv_fx.planner.loss import Ends
from xconv_fx.planner.microbatches import Batch, Microbatches

SAMPLES = 4

# Each takes a value of SAMPLES x SAMPLES x 4 x 4, and a parameter of SAMPLES x SAMPLES, to a value of the same shape.
APART = [
    lambda y, w: F.conv2d(y, w[:, :, None, None].expand(-1, -1, 3, 3), padding=1),
    lambda y, w: F.silu(y),
    lambda y, w: F.group_norm(y, 2),
    lambda y, w: y.view(SAMPLES, -1).softmax(1).view(SAMPLES, SAMPLES, 4, 4) * 8,
    lambda y, w: (y.permute(0, 2, 3, 1).reshape(-1, SAMPLES) @ w).view(SAMPLES, 4, 4, SAMPLES).permute(0, 3, 1, 2),
    lambda y, w: y * (w / w.view(w.size(0), -1).std(1).view(-1, 1).expand_as(w)).sum(1).view(1, -1, 1, 1),
    lambda y, w: torch.cat([torch.zeros(SAMPLES, 1, 4, 4, dtype=y.dtype), y[:, 1:]], 1) + w.mean(),
    lambda y, w: torch.einsum("bchw,cd->bdhw", y, w),
    lambda y, w: y.unflatten(1, (2, 2)).flip(2).flatten(1, 2),
    lambda y, w: y.view(SAMPLES * 2, 2, 4, 4).cumsum(1).view(SAMPLES, SAMPLES, 4, 4),
    lambda y, w: torch.stack(y.unbind(1)[::-1], 1) * torch.ones(SAMPLES, 1, 1, 1, dtype=y.dtype),
    lambda y, w: F.adaptive_avg_pool2d(y, 1).squeeze()[:, :, None, None] + y * w.sum(0).view(-1, 1, 1),
    lambda y, w: F.interpolate(F.max_pool2d(y, 2), size=(SAMPLES, SAMPLES)),
    lambda y, w: y + w.new_ones(SAMPLES, SAMPLES).mm(w).mean(0).expand(SAMPLES, -1)[:, :, None, None],
    lambda y, w: y.transpose(0, 1).reshape(SAMPLES, -1).view(SAMPLES, SAMPLES, 4, 4).transpose(0, 1).roll(1, 2),
]
MIXING = [
    lambda y, w: y - y.mean((0, 2, 3), keepdim=True),
    lambda y, w: y + y.flip(0),
    lambda y, w: y.transpose(0, 1) * w.sum(),
    lambda y, w: y * w[:, :, None, None],
    lambda y, w: y + y[:1],
    lambda y, w: torch.einsum("bchw,bd->dchw", y, w),
    lambda y, w: y.view(2, -1).cumsum(1).view(SAMPLES, SAMPLES, 4, 4),
]


class Drawn(nn.Module):
    """A few of the layers above, one in five of them of those that mix samples."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = [draw.choice(MIXING if draw.random() < 0.05 else APART) for _ in range(5)]
        if seed % 4 == 3:
            self.layers[draw.randrange(5)] = draw.choice(MIXING)
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(SAMPLES, SAMPLES, generator=generator, dtype=torch.float64) for _ in self.layers]
        self.weights = nn.ParameterList(weights)

    def forward(self, y):
        for layer, weight in zip(self.layers, self.weights, strict=True):
            y = y + layer(torch.tanh(y), weight)
        return y


@pytest.mark.parametrize("seed", range(12))
def test_what_is_separable_is_the_same_in_slices(seed):
    torch._dynamo.reset()
    model = Drawn(seed)
    x = torch.randn(SAMPLES, SAMPLES, 4, 4, dtype=torch.float64)
    step = step_of(model, x)
    mixing = any(layer in MIXING for layer in model.layers)
    assert bool(step.proof.mixing) == mixing
    if mixing:
        return
    count, held = ((2, 1), (4, 0), (4, 4))[seed % 3]
    wanted = run(model, None, 1, 1, x)
    torch.testing.assert_close(run(model, step, count, held, x), wanted)


@pytest.mark.parametrize("seed", range(40))
def test_moments_are_those_of_a_loop_that_counts(seed):
    """What is alive besides one slice's run, by a loop over forward, loss and backward of all slices."""
    draw = random.Random(seed)
    count = draw.choice([2, 3, 4, 6])
    held, part, rest = draw.randint(0, count), draw.randint(1, 50), draw.randint(1, 100)
    ends = Ends(draw.randint(1, 30), draw.randint(1, 30), draw.randint(0, 30), draw.randint(0, 60))
    gradients, input_gradients = draw.randint(0, 40), draw.choice([0, part * count])
    batch = Batch(12, (True, False), part * count, input_gradients, gradients)
    microbatches = Microbatches(batch, count, held)

    found: dict[str, int] = {}
    for moment in microbatches.episodes(ends):
        found[moment.phase] = max(found.get(moment.phase, -rest), moment.extra + moment.others * rest)

    inputs, wanted = part * (count - 1), dict.fromkeys(found, 0)
    for index in range(count):
        earlier = max(0, index - (count - held))
        wanted["forward"] = max(wanted["forward"], inputs + count * ends.results + earlier * rest)
    wanted["loss"] = inputs + (count - 1) * (ends.results + ends.between) + (held - 1) * rest
    outside = ends.results + ends.kept + ends.tangents
    for index in reversed(range(count)):
        others = max(0, min(held - (count - 1 - index), held) - 1)
        summed = gradients if index < count - 1 else 0
        alive = inputs + (count - 1) * outside + input_gradients + others * rest
        again = index < count - held
        wanted["backward"] = max(wanted["backward"], alive + summed)
        if again:
            rerun = inputs + count * outside + input_gradients + summed
            wanted["forward"] = max(wanted["forward"], rerun)
    assert found == wanted
