"""Networks of the zoo whose outputs are as large as their inputs, written anew but for MONAI's.

Super-resolution's trunk, U-Nets in one to three dimensions, one with attention that denoises, and a recurrent network.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseBlock(nn.Module):
    """Five convolutions, each of which reads all before it; a fifth of the last is added to the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        outputs = (growth,) * 4 + (channels,)
        self.convs = nn.ModuleList(nn.Conv2d(channels + growth * at, o, 3, padding=1) for at, o in enumerate(outputs))

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for conv in self.convs[:-1]:
            seen = torch.cat((seen, F.leaky_relu(conv(seen), 0.2, inplace=True)), 1)
        return x + 0.2 * self.convs[-1](seen)


class DenseResidual(nn.Module):
    """Three dense blocks; a fifth of what they make is added to the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(*(DenseBlock(channels, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.dense(x)


class RRDB(nn.Module):
    """ESRGAN's generator (arXiv 1809.00219) without its upsampling, as it removes noise: (N, 3, H, W) to the same."""

    def __init__(self, channels: int = 64, growth: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(DenseResidual(channels, growth) for _ in range(blocks)))
        self.after = nn.Conv2d(channels, channels, 3, padding=1)
        wide, narrow = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.last = nn.Sequential(wide, nn.LeakyReLU(0.2, inplace=True), narrow)

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x)
        return self.last(features + self.after(self.body(features)))


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution, batch normalisation and ReLU, twice."""
    units = []
    for channels in (inputs, outputs):
        conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        units.append(nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)))
    return nn.Sequential(*units)


class UNet2d(nn.Module):
    """U-Net (arXiv 1505.04597) with batch normalisation: max pooling down, transposed convolutions up."""

    def __init__(self, classes: int = 3, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        super().__init__()
        self.down = nn.ModuleList(double_conv(i, o) for i, o in zip((1, *widths[:-1]), widths, strict=True))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairs)
        self.up = nn.ModuleList(double_conv(2 * o, o) for _, o in pairs)
        self.last = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for grow, level, skip in zip(self.grow, self.up, skips[-2::-1], strict=True):
            x = level(torch.cat((skip, grow(x)), 1))
        return self.last(x)


class TimedBlock(nn.Module):
    """GroupNorm, SiLU and convolution, twice, with the time embedding (N, `embedded`) added between, and a residual."""

    def __init__(self, inputs: int, outputs: int, embedded: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(embedded, outputs))
        self.second = nn.Sequential(nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.around = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(embedding)[:, :, None, None]
        return self.around(x) + self.second(hidden)


class Attention(nn.Module):
    """Self-attention of the pixels of (N, C, H, W) in `heads` heads, added to them."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # (N, 3 C, H, W) as three of (N, heads, H W, C / heads).
        split = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4)
        q, k, v = split.unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(2, 3).reshape(x.shape))


class TimedLevel(nn.Module):
    """Two blocks of one size, each followed by attention where the level attends."""

    def __init__(self, inputs: int, outputs: int, embedded: int, attends: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TimedBlock(i, outputs, embedded) for i in (inputs, outputs))
        self.attention = nn.ModuleList(Attention(outputs) for _ in range(2 * attends))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for place, block in enumerate(self.blocks):
            x = block(x, embedding)
            if self.attention:
                x = self.attention[place](x)
        return x


class DiffusionUNet(nn.Module):
    """The U-Net of denoising diffusion (arXiv 2006.11239): predicts the noise in (N, 3, H, W).

    Times stand for how noisy images are, and are told from that: images are all that it is called with.
    """

    def __init__(self, width: int = 32, widths: tuple[int, ...] = (32, 64, 64, 128), lowest: int = 2) -> None:
        super().__init__()
        self.width, embedded = width, 4 * width
        self.embed = nn.Sequential(nn.Linear(width, embedded), nn.SiLU(), nn.Linear(embedded, embedded))
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        attends = [place >= len(widths) - lowest for place in range(len(widths))]
        steps = list(zip((widths[0], *widths[:-1]), widths, attends, strict=True))
        self.down = nn.ModuleList(TimedLevel(i, o, embedded, a) for i, o, a in steps)
        self.shrink = nn.ModuleList(nn.Conv2d(o, o, 3, 2, 1) for o in widths[:-1])
        self.middle = TimedLevel(widths[-1], widths[-1], embedded, True)
        self.up = nn.ModuleList(TimedLevel(2 * o, i, embedded, a) for i, o, a in reversed(steps))
        self.grow = nn.ModuleList(nn.Conv2d(o, o, 3, padding=1) for o in widths[-2::-1])
        self.last = nn.Sequential(nn.GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 3, 3, padding=1))

    def embedding(self, x: Tensor) -> Tensor:
        """Of a time for each sample of `x`, (N, 4 width): sines and cosines of them through two linear layers."""
        half, times = self.width // 2, 500 * x.detach().flatten(1).std(1, keepdim=True)
        rates = torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000) / half))
        angles = (times * rates).to(x.dtype)
        return self.embed(torch.cat((angles.sin(), angles.cos()), 1))

    def forward(self, x: Tensor) -> Tensor:
        embedding, x, skips = self.embedding(x), self.first(x), []
        for place, level in enumerate(self.down):
            x = level(self.shrink[place - 1](x) if place else x, embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        for place, level in enumerate(self.up):
            x = self.grow[place - 1](F.interpolate(x, scale_factor=2.0)) if place else x
            x = level(torch.cat((x, skips.pop()), 1), embedding)
        return self.last(x)


class WaveLevel(nn.Module):
    """What happens at one resolution of (N, C, T): a convolution, all lower resolutions, another convolution."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        inputs, outputs, *deeper = widths
        self.down = nn.Sequential(nn.Conv1d(inputs, outputs, 15, padding=7), nn.LeakyReLU(0.2))
        self.inner: nn.Module = nn.Identity()
        if deeper:
            self.inner = WaveLevel((outputs, *deeper))
        self.up = nn.Sequential(nn.Conv1d(2 * outputs if deeper else outputs, inputs, 5, padding=2), nn.LeakyReLU(0.2))
        self.bottom = not deeper

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        if self.bottom:
            return self.up(skip)
        below = F.interpolate(self.inner(skip[:, :, ::2]), scale_factor=2.0, mode="linear", align_corners=False)
        return self.up(torch.cat((skip, below), 1))


class WaveUNet(nn.Module):
    """Wave-U-Net (arXiv 1806.03185): a waveform (N, 1, T) to one of its sources, of the same shape."""

    def __init__(self, levels: int = 8, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(1, width, 15, padding=7), nn.LeakyReLU(0.2))
        self.level = WaveLevel(tuple(width * at for at in range(1, levels + 1)))
        self.last = nn.Sequential(nn.Conv1d(width + 1, 1, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat((x, self.level(self.first(x))), 1))


class LSTMCell(nn.Module):
    """One step of a convolutional LSTM: input (N, I, H, W), state and memory (N, C, H, W) to new state and memory."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(inputs + channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        enter, keep, leave, new = self.gates(torch.cat((x, state), 1)).chunk(4, 1)
        memory = keep.sigmoid() * memory + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * memory.tanh(), memory


class LSTMLayer(nn.Module):
    """A cell at every step of (N, T, I, H, W): its states, (N, T, C, H, W)."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.channels, self.cell = channels, LSTMCell(inputs, channels)

    def forward(self, x: Tensor) -> Tensor:
        state = memory = x.new_zeros(x.shape[0], self.channels, *x.shape[3:])
        states = []
        for step in range(x.shape[1]):
            state, memory = self.cell(x[:, step], state, memory)
            states.append(state)
        return torch.stack(states, 1)


class ConvLSTM(nn.Module):
    """Convolutional LSTM (arXiv 1506.04214) of two layers: frames (N, T, C, H, W) to the frames that follow them."""

    def __init__(self, frames: int = 3, channels: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(LSTMLayer(frames, channels), LSTMLayer(channels, channels))
        self.last = nn.Conv2d(channels, frames, 1)

    def forward(self, x: Tensor) -> Tensor:
        states = self.layers(x)
        return self.last(states.flatten(0, 1)).unflatten(0, x.shape[:2])
