"""Which models treat samples apart: the proof, and what really happens to slices of a batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.tracing import trace
from torch import nn

from xconv_fx.passes import batch_separability
from xconv_fx.passes.batch_separability import separability

BATCH = 6


class Apply(nn.Module):
    """A function of the activations and a parameter, as a layer."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, torch.Size(shape).numel()).reshape(shape))

    def forward(self, x):
        return self.function(x, self.weight)


def conv(before, after, **options):
    return nn.Conv2d(before, after, 3, padding=1, **options)


def attention(x, w):
    rows = x.flatten(2).transpose(1, 2)
    scores = torch.softmax(rows @ rows.transpose(1, 2), -1)
    return (scores @ rows).transpose(1, 2).reshape(x.shape) * w


APART = {
    "convolutions": (conv(3, 4), nn.ReLU(), conv(4, 4, groups=2, stride=2)),
    "transposed": (nn.ConvTranspose2d(3, 4, 2, stride=2), nn.PReLU(4)),
    "pooling": (conv(3, 4), nn.MaxPool2d(2), nn.AvgPool2d(2)),
    "classifier": (conv(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.LogSoftmax(-1)),
    "instance norm": (conv(3, 4), nn.InstanceNorm2d(4, affine=True)),
    "group norm": (conv(3, 4), nn.GroupNorm(2, 4)),
    "layer norm, channels last": (
        Apply(lambda x, w: x.permute(0, 2, 3, 1)),
        nn.LayerNorm(3),
        nn.Linear(3, 8),
        nn.GELU(),
        Apply(lambda x, w: x.permute(0, 3, 1, 2)),
    ),
    "resampling": (nn.Upsample(scale_factor=2, mode="bilinear"), conv(3, 4)),
    "pixel shuffle": (conv(3, 4), nn.PixelShuffle(2)),
    "padding and crops": (nn.ReflectionPad2d(1), conv(3, 4), Apply(lambda x, w: x[:, 1:, 2:-1] + x[:, :1, 2:-1])),
    "skips": (Apply(lambda x, w: torch.cat([x, x * w], dim=1), 3, 1, 1), conv(6, 4)),
    "attention": (Apply(attention, 3, 1, 1),),
    "dropout": (conv(3, 4), nn.Dropout(0.5), conv(4, 4)),
    "a constant times the batch's size": (Apply(lambda x, w: x * w / x.shape[0]),),
    "one time for all, embedded": (
        Apply(lambda x, w: x + F.linear(torch.arange(4.0).expand(len(x), -1).sin(), w)[:, :, None, None], 3, 4),
    ),
    "one matrix for all": (
        Apply(lambda x, w: x + torch.bmm(w.expand(len(x), 8, 8), w.T.expand(len(x), 8, 8))[:, None], 8, 8),
    ),
    "evaluated batch norm": (conv(3, 4), nn.BatchNorm2d(4).eval()),
}

MIXED = {
    "batch norm": ((conv(3, 4), nn.BatchNorm2d(4)), "as in batch normalisation"),
    "batch statistics": ((Apply(lambda x, w: x - x.mean((0, 2, 3), keepdim=True) * w),), "reduction over samples"),
    "a mean of all": ((Apply(lambda x, w: x - x.mean() * w),), "reduction over all samples"),
    "the loss inside": ((conv(3, 4), Apply(lambda x, w: (x * w).mean())), "reduction over"),
    "softmax over samples": ((Apply(lambda x, w: torch.softmax(x * w, 0)),), "samples"),
    "neighbours": ((Apply(lambda x, w: x * w + x.roll(1, 0)),), "samples"),
    "reversed": ((Apply(lambda x, w: x * w + x.flip(0)),), "picks samples"),
    "sums so far": ((Apply(lambda x, w: torch.cumsum(x * w, 0)),), "picks samples"),
    "half the batch": ((Apply(lambda x, w: x[:3] * w + x[3:]),), "picks samples"),
    "twice the batch": ((Apply(lambda x, w: torch.cat([x, x * w])),), "beside each other"),
    "a weight for each sample": ((Apply(lambda x, w: x * w, BATCH, 1, 1, 1),), "constant of its own"),
    "a time for each sample, embedded": (
        (Apply(lambda x, w: x + F.linear(torch.arange(4.0 * len(x)).view(-1, 4), w)[:, :, None, None], 3, 4),),
        "constant of its own",
    ),
    "a column for each sample": (
        (Apply(lambda x, w: x + (torch.ones(3, 2) @ w).T[:, :, None, None], 2, BATCH),),
        "constant of its own",
    ),
    "similarity": ((Apply(lambda x, w: x.flatten(1) @ x.flatten(1).T * w),), "product of samples"),
    "all to all": ((Apply(lambda x, w: x[:, None] - x[None] * w),), "combined with other samples"),
    "lost in a view": ((Apply(lambda x, w: (x * w).reshape(-1, 4)),), "result"),
    "one sample's rows in another's": ((Apply(lambda x, w: (x * w).reshape(4, -1).sum(0, keepdim=True)),), "splits"),
    "transposed result": ((nn.Flatten(), Apply(lambda x, w: (x * w).T)), "not one row for each sample"),
}


def model_of(layers):
    return nn.Sequential(*layers)


def found(model, x):
    joint = trace(model, x)
    batched = [value.shape == x.shape for value in joint.primals]
    assert sum(batched) == 1
    return separability(joint.gm, batched, BATCH, joint.arguments["num_fwd_outputs"])


@pytest.fixture
def x():
    return torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", APART)
def test_samples_apart(name, x):
    model = model_of(APART[name])
    assert found(model, x).mixing == ""
    if name not in ("dropout", "a constant times the batch's size"):
        with torch.no_grad():
            parts = torch.cat([model(part) for part in x.split(2)])
            torch.testing.assert_close(parts, model(x))


@pytest.mark.parametrize("name", MIXED)
def test_samples_mixed(name, x):
    layers, expected = MIXED[name]
    assert expected in found(model_of(layers), x).mixing


def test_the_layer_is_named(x):
    assert "in 1" in found(nn.Sequential(conv(3, 4), Apply(lambda x, w: x - x.mean(0) * w)), x).mixing


def kept(x):
    return torch.empty(len(x), 1, 1, 1).bernoulli_(0.5)


# What a model draws: numbers of each sample's own, or numbers that all samples share.
DRAWS = {
    "nothing": (batch_separability.NOTHING, lambda x, w: torch.relu(x)),
    "dropout": (batch_separability.SAMPLES, lambda x, w: F.dropout(x, 0.5)),
    "dropout of channels": (batch_separability.SAMPLES, lambda x, w: F.dropout2d(x)),
    "stochastic depth": (batch_separability.SAMPLES, lambda x, w: x * kept(x) / 0.5),
    "rrelu": (batch_separability.SAMPLES, lambda x, w: F.rrelu(x, training=True)),
    "noise like the samples": (batch_separability.SAMPLES, lambda x, w: x + torch.randn_like(x)),
    "a class for each sample": (batch_separability.SAMPLES, lambda x, w: torch.multinomial(x.flatten(1).exp(), 2)),
    "a number": (batch_separability.BATCH, lambda x, w: x * torch.rand(())),
    "a number of four dimensions": (batch_separability.BATCH, lambda x, w: x * torch.empty(1, 1, 1, 1).bernoulli_(0.5)),
    "a map": (batch_separability.BATCH, lambda x, w: x + torch.randn(1, *x.shape[1:])),
    "a draw for each of as many channels": (
        batch_separability.BATCH,
        lambda x, w: x * torch.rand(BATCH).view(1, -1, 1, 1),
    ),
    "dropout of weights": (batch_separability.BATCH, lambda x, w: x * F.dropout(w)),
    "a permutation of channels": (batch_separability.BATCH, lambda x, w: x[:, torch.randperm(BATCH)]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_whose_a_draw_is(name, x):
    kind, function = DRAWS[name]
    proof = found(nn.Sequential(conv(3, BATCH), Apply(lambda x, w: function(x, w) * w.sum(), BATCH, 1, 1)), x)
    assert (proof.mixing, proof.draws) == ("", kind)


def test_draws_of_both_kinds(x):
    proof = found(nn.Sequential(conv(3, 4), nn.Dropout(), Apply(lambda x, w: x * torch.rand(()) * w)), x)
    assert "a draw that all samples share" in proof.mixing


class Changes(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.conv, self.change = conv(3, 4), change
        self.register_buffer("buffer", torch.ones(4, 1, 1))

    def forward(self, x):
        y = self.conv(x * 2)
        self.change(self, x, y)
        return y * self.buffer.sum()


def average(y):
    return y.detach().mean((0, 2, 3))[:, None, None]


# How many inputs slices must change, or why there are none.
CHANGES = {
    "nothing": (0, lambda net, x, y: None),
    "a counter": (1, lambda net, x, y: net.buffer.add_(1)),
    "an average of weights": (1, lambda net, x, y: net.buffer.lerp_(net.conv.weight.detach()[:, :1, :1, 0], 0.1)),
    "the input": (1, lambda net, x, y: x.mul_(2)),
    "channels of the input": (1, lambda net, x, y: x[:, 0].sub_(x[:, 1])),
    "an average of samples": ("reduction over samples", lambda net, x, y: net.buffer.copy_(average(y))),
    "a sample": ("picks samples", lambda net, x, y: net.buffer.copy_(average(y[:1]))),
    "the input by its mean": ("reduction over", lambda net, x, y: x.sub_(x.mean())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_in_place(name, x):
    wanted, change = CHANGES[name]
    proof = found(Changes(change), x)
    if isinstance(wanted, str):
        assert wanted in proof.mixing
    else:
        assert (proof.mixing, len(proof.changed)) == ("", wanted)


def test_a_parameter_that_is_changed(x):
    def clipped(net, x, y):
        with torch.no_grad():
            net.conv.weight.clamp_(-1, 1)

    class Clipped(Changes):
        def forward(self, x):
            self.change(self, x, None)
            return self.conv(x)

    assert "a parameter is changed in place" in found(Clipped(clipped), x).mixing
