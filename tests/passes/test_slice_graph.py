"""Which sizes of a graph are the batch's: sliced steps against plain autograd, for models that write sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.microbatches import check, step_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xconv_fx.passes.slice_graph import NotSliceable

BATCH = 6


class Net(nn.Module):
    """A convolution to `width` channels, and a function of its result and of the module."""

    def __init__(self, function, width: int = BATCH):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 36 * width).view(width, 4, 3, 3))
        self.register_buffer("steps", torch.zeros(1))
        self.function = function

    def forward(self, x):
        return self.function(self, self.conv(x))


def standardised(net, y):
    w = net.weight - net.weight.mean((1, 2, 3), keepdim=True)
    std = w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
    return y * (w / std.expand_as(w)).reshape(w.size(0), -1).sum(1).view(1, -1, 1, 1)


def convlstm(net, y):
    h = torch.zeros(y.shape[0], y.shape[1], *y.shape[2:], dtype=y.dtype)
    c = y.new_zeros(y.shape)
    for part in (y, y * 0.5):
        gates = torch.cat([part, h], 1)
        i, g = gates.chunk(2, dim=1)
        c = c * torch.sigmoid(i) + torch.tanh(g)
        h = torch.tanh(c)
    return h


def tokens(net, y):
    token = net.weight[:1, :1, 0].expand(y.shape[0], -1, -1)[..., :1]
    sequence = torch.cat([token, y.flatten(2)[:, :1, :].transpose(1, 2)], 1)
    return sequence.squeeze(-1)


def eight_channels_of_zeros(net, y):
    shared = torch.zeros(BATCH, BATCH, dtype=y.dtype)
    state = torch.zeros(BATCH, BATCH, dtype=y.dtype)
    return torch.cat([state, y.mean((2, 3))], 1) + (net.weight[:, 0, 0, 0] @ shared).repeat(2)


def volumes(net, y):
    b, c, h, w = y.shape
    flat = y.view(b * 2, c // 2, h, w)
    flat = F.conv2d(flat, net.weight[:, :3])
    return flat.view(b, 2, *flat.shape[1:])


def expected_place(net, y):
    grid = torch.linspace(0, 1, y.shape[2], dtype=y.dtype).view(1, 1, -1, 1).expand(y.shape[0], 1, -1, y.shape[3])
    return torch.cat([y, grid], dim=1)


def sampled(net, y):
    theta = torch.eye(2, 3, dtype=y.dtype).repeat(y.shape[0], 1, 1) * y.mean((1, 2, 3)).view(-1, 1, 1)
    return F.grid_sample(y, F.affine_grid(theta, y.shape, align_corners=False), align_corners=False)


def own_position(net, y):
    return y.flatten(2)[torch.arange(y.shape[0]), :, y.shape[0] - 1]


def squeezed_channels(net, y):
    b, c, _, _ = y.size()
    scale = F.adaptive_avg_pool2d(y, 1).view(b, c)
    return y * torch.sigmoid(scale @ net.weight[:, 0, 0, 0].outer(net.weight[:, 1, 1, 1])).view(b, c, 1, 1)


def wrapped(net, y):
    def block(z):
        return F.silu(z.view(z.shape[0], 2, -1)).view(z.shape) * net.weight.view(net.weight.shape[0], -1).sum()

    return checkpoint(block, y, use_reentrant=False) + checkpoint(block, y * 2, use_reentrant=False)


def counted(net, y):
    net.steps.add_(1)
    return y / (1 + 0.1 * net.steps)


def detached(net, y):
    return y, y.mean((2, 3)).detach(), y.argmax(1), y[:, :1]


def written(net, y):
    z = torch.zeros_like(y)
    z[:, 1:, :2] = y[:, 1:, 2:]
    z[:, 0] = y[:, 1] * 2
    return z


def in_place(net, y):
    return y.sub_(0.45).div_(0.225) * 2


def unpooled(net, y):
    small, places = F.max_pool2d(y, 2, return_indices=True)
    return F.max_unpool2d(small * 2, places, 2)


def stochastic_depth(net, y):
    for _ in range(2):
        y = y + F.silu(y) * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.5).div_(0.5)
    noise = torch.empty(y.shape[0], 1, 1, 1, dtype=y.dtype)
    noise.bernoulli_(0.5)
    noise.div_(0.5)
    return y * noise


def drawn_for_all(net, y):
    channels = torch.rand(y.shape[1], dtype=y.dtype).view(1, -1, 1, 1)
    return y * channels * torch.bernoulli(torch.full((1, 1, 1, 1), 0.5)) + net.weight[0, 0, 0, 0] * channels


def unpooled_volume(net, y):
    volume = y.unflatten(1, (BATCH // 2, 2))
    small, places = F.max_pool3d(volume, 2, return_indices=True)
    return F.max_unpool3d(small * 2, places, 2).flatten(1, 2)


FOLLOW = {
    "unpooling": unpooled,
    "unpooling of volumes": unpooled_volume,
    "circular and reflected": lambda net, y: F.pad(
        F.pad(y, (1, 0, 2, 1), mode="circular"), (1, 1, 1, 1), mode="reflect"
    ),
    "stochastic depth": stochastic_depth,
    "drawn for all": drawn_for_all,
    "weight standardisation": standardised,
    "first states": convlstm,
    "class tokens": tokens,
    "two readings of one number": eight_channels_of_zeros,
    "samples times depth": volumes,
    "coordinates": expected_place,
    "grid_sample": sampled,
    "a position of each sample": own_position,
    "squeeze and excite": squeezed_channels,
    "checkpoints": wrapped,
    "unflatten": lambda net, y: y.unflatten(1, (BATCH // 2, 2)).unflatten(0, (BATCH, 1)).flatten(1, 3),
    "squeeze": lambda net, y: F.adaptive_avg_pool2d(y, 1).squeeze() * net.weight[:, 0, 0, 0],
    "interpolate": lambda net, y: F.interpolate(y, size=(BATCH, BATCH)),
    "repeat": lambda net, y: y + net.weight[:1, :1, :1, :1].repeat(BATCH, 1, 1, 1),
    "merged rows": lambda net, y: (y.permute(0, 2, 3, 1).reshape(-1, BATCH) @ net.weight[:, :, 0, 0]).view(BATCH, -1),
    "transposed": lambda net, y: y.permute(1, 0, 2, 3).reshape(BATCH, -1).view(BATCH, BATCH, -1).transpose(0, 1),
    "counter": counted,
    "detached": detached,
    "unbind": lambda net, y: torch.stack(y.unbind(1)[::2], 1) + sum(y.split(2, 1)[:1])[:, :1],
    "slices written": written,
    "circular padding": lambda net, y: F.pad(y, (1, 2, 2, 1), mode="circular"),
    "sorted": lambda net, y: y.sort(1).values + y.topk(2, dim=1).values[:, :1] + y.cumsum(2).flip(3).roll(1, 2),
    "gathered": lambda net, y: y.gather(1, y.argsort(1)) + F.pixel_shuffle(F.pixel_unshuffle(y, 2), 2),
    "einsum": lambda net, y: torch.einsum("bchw,cd->bdhw", y, net.weight[:, :, 0, 0]),
    "attention": lambda net, y: F.scaled_dot_product_attention(y, y, y),
    "layer norm": lambda net, y: F.layer_norm(y, y.shape[1:]) + F.layer_norm(y, y.shape[-1:]),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, 3, 4, 4)


@pytest.mark.parametrize("name", FOLLOW)
def test_sizes_follow_the_batch(name, x):
    check(Net(FOLLOW[name]), x)


def test_what_cannot_be_sliced(x):
    def chosen(net, y):
        return y * torch.zeros(1, 1, 1, 1, dtype=y.dtype) + y.as_strided((BATCH, BATCH, 4, 4), (96, 16, 4, 1))

    step = step_of(Net(chosen), x)
    assert step.proof.mixing == ""
    with pytest.raises(NotSliceable, match="as_strided"):
        step.sliced(2, 0)
