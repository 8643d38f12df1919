"""The grammar: pieces that networks are drawn from, each as what is drawn of it and the lines that it writes.

A piece is a dict of its `kind` and what was drawn, so that a case can be stored, shrunk and written again. Kinds of one
family are drawn alike often, however many there are of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from .writer import Misfit, Writer

Piece = dict[str, Any]


class Kind(NamedTuple):
    """One row of the grammar: how often it is drawn, what is drawn of it, and what it writes."""

    weight: float
    draw: Callable[[random.Random], Piece]
    write: Callable[[Writer, Piece], None]


KINDS: dict[str, Kind] = {}

# Names that programs use besides torch's, with their source.
HELPERS = {
    "StandardisedConv": '''
class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        std = w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, w / std.expand_as(w), self.bias, self.stride, self.padding, self.dilation, self.groups)
''',
    "FrozenBatchNorm": '''
class FrozenBatchNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.1), ("bias", 0.1), ("mean", 0.05), ("var", 0.9)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = self.weight.reshape(shape) * (self.var.reshape(shape) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(shape) - self.mean.reshape(shape) * scale)
''',
}  # fmt: skip


def kind(name: str, weight: float = 1.0, **choices: list[Any]) -> Callable[[Any], Any]:
    """Adds a kind of this weight, of which each of `choices` is drawn."""

    def add(write: Callable[[Writer, Piece], None]) -> Callable[[Writer, Piece], None]:
        assert name not in KINDS
        KINDS[name] = Kind(weight, lambda rng: {key: rng.choice(of) for key, of in choices.items()}, write)
        return write

    return add


def draw_piece(rng: random.Random, depth: int = 0) -> Piece:
    """A piece; those with a body have one of one to three pieces."""
    names = [name for name in KINDS if depth < 2 or name not in NESTED]
    name = rng.choices(names, [KINDS[n].weight for n in names])[0]
    piece = {"kind": name, **KINDS[name].draw(rng)}
    if name in NESTED:
        piece["body"] = [draw_piece(rng, depth + 1) for _ in range(rng.randint(1, 3))]
    return piece


def write(writer: Writer, piece: Piece) -> None:
    """Write a piece. Raises `Misfit`."""
    KINDS[piece["kind"]].write(writer, piece)


def _body(writer: Writer, piece: Piece) -> None:
    """Pieces of the body that fit; at least one."""
    before = len(writer.lines)
    for part in piece["body"]:
        _unless_misfit(writer, part)
    writer.require(len(writer.lines) > before)


def _unless_misfit(writer: Writer, piece: Piece) -> bool:
    """Write a piece, or leave everything as it was; whether it fits."""
    state = [*writer.init], [*writer.lines], [*writer.methods], dict(writer.values)
    try:
        write(writer, piece)
    except Misfit:
        writer.init, writer.lines, writer.methods, writer.values = state
        return False
    return True


write_if_fits = _unless_misfit


# Convolutions.


def _padding(p: Piece) -> str:
    same = p["dilation"] * (p["kernel"] - 1) // 2
    if p["padding"] == "none":
        return ""
    mode = "" if p["padding"] == "zeros" else f', padding_mode="{p["padding"]}"'
    return f", padding={same}{mode}"


def _convolution(w: Writer, p: Piece) -> str:
    out, groups = p["out"], 1
    if p["groups"] == "depthwise":
        out = groups = w.channels
    elif p["groups"] == "two":
        w.require(w.channels % 2 == 0 and out % 2 == 0)
        groups = 2
    settings = f"{w.channels}, {out}, {p['kernel']}, stride={p['stride']}{_padding(p)}"
    settings += f", dilation={p['dilation']}" if p["dilation"] > 1 else ""
    settings += f", groups={groups}" if groups > 1 else ""
    settings += "" if p["bias"] else ", bias=False"
    return f"nn.Conv{w.dims}d({settings})"


CONVOLUTION: dict[str, list[Any]] = {
    "out": [1, 2, 4, 8, 8, 12, 16, 24], "kernel": [1, 2, 3, 3, 3, 4, 5, 7], "stride": [1, 1, 1, 2],
    "dilation": [1, 1, 1, 2], "padding": ["zeros", "zeros", "zeros", "none", "circular", "reflect"],
    "groups": ["one", "one", "one", "two", "depthwise"], "bias": [True, False],
}  # fmt: skip


@kind("conv", 8, **CONVOLUTION)
def _conv(w: Writer, p: Piece) -> None:
    w.layer("conv", _convolution(w, p))


@kind(
    "transposed",
    1.5,
    out=[4, 8, 16],
    kernel=[2, 3, 4],
    stride=[1, 2, 2],
    groups=[1, 1, 2],
    padding=[0, 1],
    bias=[True, False],
)
def _transposed(w: Writer, p: Piece) -> None:
    w.require(w.channels % p["groups"] == 0 and max(w.spatial) <= 24)
    settings = (
        f"{w.channels}, {p['out']}, {p['kernel']}, stride={p['stride']}, padding={p['padding']}, groups={p['groups']}"
    )
    w.layer("up", f"nn.ConvTranspose{w.dims}d({settings}, bias={p['bias']})")


@kind("parametrised", 1, how=["weight_norm", "spectral_norm", "parametrizations.weight_norm"], **CONVOLUTION)
def _parametrised(w: Writer, p: Piece) -> None:
    how = {"spectral_norm": "nn.utils.parametrizations.spectral_norm"}.get(p["how"], f"nn.utils.{p['how']}")
    w.layer("conv", f"{how}({_convolution(w, p)})")


@kind("standardised", 0.7, out=[4, 8, 16])
def _standardised(w: Writer, p: Piece) -> None:
    w.require(w.dims == 2)
    w.layer("conv", f"StandardisedConv({w.channels}, {p['out']}, 3, padding=1)")


@kind("shared", 0.7, times=[2, 3], between=["F.relu", "F.silu", "torch.tanh"])
def _shared(w: Writer, p: Piece) -> None:
    conv = w.attribute("conv", f"nn.Conv{w.dims}d({w.channels}, {w.channels}, 3, padding=1)")
    w.line(f"for _ in range({p['times']}): x = {p['between']}({conv}(x))")


@kind("recurrent", 0.5, times=[2, 3], hidden=[4, 8])
def _recurrent(w: Writer, p: Piece) -> None:
    """A ConvLSTM-like cell whose first state is a constant."""
    hidden = p["hidden"]
    conv = w.attribute("cell", f"nn.Conv{w.dims}d({w.channels + hidden}, {2 * hidden}, 3, padding=1)")
    state = w.name("h")
    w.line(f"{state} = x.new_zeros(x.size(0), {hidden}, *x.shape[2:])")
    step = f"i, g = {conv}(torch.cat([x, {state}], 1)).chunk(2, 1); {state} = {state} * i.sigmoid() + g.tanh()"
    w.line(f"for _ in range({p['times']}): {step}")
    w.line(f"x = {state}")


@kind("slicewise", 0.7, out=[4, 8])
def _slicewise(w: Writer, p: Piece) -> None:
    """2.5D: a volume's slices as images of one large batch."""
    w.require(w.dims == 3)
    conv = w.attribute("conv", f"nn.Conv2d({w.channels}, {p['out']}, 3, padding=1)")
    w.line("b, c, d, h, w = x.shape")
    w.line(f"x = {conv}(x.transpose(1, 2).reshape(b * d, c, h, w)).view(b, d, {p['out']}, h, w).transpose(1, 2)")


# Normalisation.


@kind("batch_norm", 3, momentum=["0.1", "0.1", "None"], affine=[True, True, False], track=[True, True, False])
def _batch_norm(w: Writer, p: Piece) -> None:
    settings = f"{w.channels}, momentum={p['momentum']}, affine={p['affine']}, track_running_stats={p['track']}"
    w.layer("norm", f"nn.BatchNorm{w.dims}d({settings})")


@kind("group_norm", 2, groups=[1, 2, 4])
def _group_norm(w: Writer, p: Piece) -> None:
    w.require(w.channels % p["groups"] == 0)
    w.layer("norm", f"nn.GroupNorm({p['groups']}, {w.channels})")


@kind("instance_norm", 1.5, affine=[True, False], track=[False, False, True])
def _instance_norm(w: Writer, p: Piece) -> None:
    w.layer("norm", f"nn.InstanceNorm{w.dims}d({w.channels}, affine={p['affine']}, track_running_stats={p['track']})")


@kind("layer_norm", 1, over=["channels", "all"])
def _layer_norm(w: Writer, p: Piece) -> None:
    if p["over"] == "all":
        return w.layer("norm", f"nn.LayerNorm({list(w.x.shape[1:])})")
    norm = w.attribute("norm", f"nn.LayerNorm({w.channels})")
    return w.line(f"x = {norm}(x.movedim(1, -1)).movedim(-1, 1)")


@kind("local_response", 0.4)
def _local_response(w: Writer, p: Piece) -> None:
    w.layer("norm", "nn.LocalResponseNorm(3)")


@kind("frozen_batch_norm", 0.5)
def _frozen_batch_norm(w: Writer, p: Piece) -> None:
    w.layer("norm", f"FrozenBatchNorm({w.channels})")


# Activations.

ACTIVATIONS = [
    "nn.ReLU()", "nn.ReLU()", "nn.ReLU(inplace=True)", "nn.ReLU(inplace=True)", "nn.LeakyReLU(0.2)",
    "nn.LeakyReLU(0.1, True)", "nn.SiLU()", "nn.SiLU(True)",
    "nn.GELU()", "nn.PReLU()", "nn.ELU()", "nn.Hardswish()", "nn.Softplus()", "nn.Mish()",
    "nn.Sigmoid()", "nn.Tanh()", "nn.ReLU6()", "nn.Hardtanh(inplace=True)", "nn.RReLU()",
]  # fmt: skip


@kind("activation", 6, layer=ACTIVATIONS)
def _activation(w: Writer, p: Piece) -> None:
    w.layer("act", p["layer"])


@kind("glu", 0.5)
def _glu(w: Writer, p: Piece) -> None:
    w.require(w.channels % 2 == 0)
    w.line("x = F.glu(x, 1)")


@kind("softmax", 0.3)
def _softmax(w: Writer, p: Piece) -> None:
    w.line("x = x.softmax(1) * x.size(1)")


# Pooling and resampling.


@kind("max_pool", 1.5, kernel=[2, 3], stride=[1, 2, 2], ceil=[True, False], padding=[0, 1])
def _max_pool(w: Writer, p: Piece) -> None:
    w.layer("pool", f"nn.MaxPool{w.dims}d({p['kernel']}, {p['stride']}, padding={p['padding']}, ceil_mode={p['ceil']})")


@kind("unpool", 0.5)
def _unpool(w: Writer, p: Piece) -> None:
    w.line(f"p, i = F.max_pool{w.dims}d(x, 2, return_indices=True)")
    w.line(f"x = F.max_unpool{w.dims}d(torch.tanh(p), i, 2, output_size=x.shape[2:])")


@kind("avg_pool", 1, kernel=[2, 3], stride=[1, 2], ceil=[True, False], padding=[0, 1], count=[True, False])
def _avg_pool(w: Writer, p: Piece) -> None:
    settings = f"{p['kernel']}, {p['stride']}, padding={p['padding']}, ceil_mode={p['ceil']}"
    w.layer("pool", f"nn.AvgPool{w.dims}d({settings}, count_include_pad={p['count']})")


@kind("adaptive_pool", 1, how=["avg", "avg", "max"], size=[1, 3, 4, 6])
def _adaptive_pool(w: Writer, p: Piece) -> None:
    w.line(f"x = F.adaptive_{p['how']}_pool{w.dims}d(x, {p['size']})")


@kind("fractional_pool", 0.4)
def _fractional_pool(w: Writer, p: Piece) -> None:
    w.require(w.dims > 1 and min(w.spatial) >= 6)
    w.layer("pool", f"nn.FractionalMaxPool{w.dims}d(2, output_ratio=0.7)")


@kind("lp_pool", 0.4)
def _lp_pool(w: Writer, p: Piece) -> None:
    w.require(w.dims < 3)
    w.line(f"x = F.lp_pool{w.dims}d(F.softplus(x), 2, 2)")


MODES = {
    1: ["nearest", "linear", "area"],
    2: ["nearest", "bilinear", "bicubic", "area", "nearest-exact"],
    3: ["nearest", "trilinear"],
}


@kind("resample", 1.5, mode=range(5), scale=["2", "0.5", "1.5"], align=[True, False])
def _resample(w: Writer, p: Piece) -> None:
    w.require(max(w.spatial) * float(p["scale"]) <= 48)
    mode = MODES[w.dims][p["mode"] % len(MODES[w.dims])]
    align = f", align_corners={p['align']}" if mode.endswith(("linear", "cubic")) else ""
    w.line(f'x = F.interpolate(x, scale_factor={p["scale"]}, mode="{mode}"{align})')


@kind("pixel_shuffle", 0.5, how=["shuffle", "unshuffle"])
def _pixel_shuffle(w: Writer, p: Piece) -> None:
    w.require(w.dims == 2)
    w.line(f"x = F.pixel_{p['how']}(x, 2)")


@kind("pad", 0.4, mode=["reflect", "replicate", "constant", "circular"])
def _pad(w: Writer, p: Piece) -> None:
    w.line(f'x = F.pad(x, {(1, 2) * w.dims}, mode="{p["mode"]}")')


# Attention, views, sums over samples.


@kind("squeeze_excite", 1, view=["view", "flatten", "keep"])
def _squeeze_excite(w: Writer, p: Piece) -> None:
    mean, ones = str(tuple(range(2, 2 + w.dims))), "1, " * w.dims
    if p["view"] == "keep":
        layer = w.attribute("gate", f"nn.Conv{w.dims}d({w.channels}, {w.channels}, 1)")
        return w.line(f"x = x * {layer}(x.mean({mean}, keepdim=True)).sigmoid()")
    layer = w.attribute("gate", f"nn.Linear({w.channels}, {w.channels})")
    if p["view"] == "flatten":
        return w.line(
            f"x = x * {layer}(F.adaptive_avg_pool{w.dims}d(x, 1).flatten(1)).sigmoid().unflatten(1, (-1, {ones}))"
        )
    w.line("b, c = x.shape[:2]")
    return w.line(f"x = x * {layer}(x.mean({mean}).view(b, c)).sigmoid().view(b, c, {ones})")


@kind("attention", 0.7, heads=[1, 2])
def _attention(w: Writer, p: Piece) -> None:
    w.require(w.channels % p["heads"] == 0 and w.x[0, 0].numel() <= 400)
    qkv = w.attribute("qkv", f"nn.Conv{w.dims}d({w.channels}, {3 * w.channels}, 1)")
    w.line(f"q, k, v = {qkv}(x).flatten(2).unflatten(1, (3, {p['heads']}, -1)).transpose(-1, -2).unbind(1)")
    w.line("x = x + F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)")


@kind("channel_shuffle", 0.5)
def _channel_shuffle(w: Writer, p: Piece) -> None:
    w.require(w.channels % 2 == 0)
    w.line("x = x.view(x.size(0), 2, x.size(1) // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)")


LINES = [
    "x = torch.cat([F.relu(x), F.relu(-x)], 1)",
    "x = torch.stack(x.unbind(1)[::-1], 1)",
    "x = torch.cat(x.split(1, 2)[:-1], 2)",
    "x = torch.cat([x, torch.ones_like(x[:, :1])], 1)",
    "x = torch.cat([x, torch.linspace(-1, 1, x.shape[-1]).expand(x.size(0), 1, *x.shape[2:]).to(x)], 1)",
    "x = x.clone(); x[:, :, 0] = 0.5",
    "x = x + 0.1 * x.detach().square()",
    "x = 0.7 * x + 0.3 * x.flip(0)",
    "x = x - x.mean(0, keepdim=True)",
    "x = torch.roll(x, 1, -1) - x",
    "x = x / (1e-3 + x.flatten(1).norm(dim=1).view(x.size(0), *[1] * (x.dim() - 1)))* 10",
    "x = x.cumsum(-1) / x.shape[-1]",
    "x = torch.where(x > 0, x, 0.5 * x.exp() - 0.5)",
    "x = F.normalize(x, dim=1)",
    "x = x.clamp(-2, 2) * x.abs().add(1).log()",
    "x = x * torch.tensor([0.9]).to(x)",
    "x = x.view(-1, *x.shape[2:]).contiguous().view(-1, x.size(1), *x.shape[2:])",
    "x = x * (x.sum(tuple(range(1, x.dim())), keepdim=True) > 0) + 0.1 * x",
    "x = torch.einsum('bc...,dc->bd...', x, torch.eye(x.size(1)).to(x)) + x.amax(1, keepdim=True)",
    "x = x.permute(0, *range(2, x.dim()), 1).contiguous().permute(0, -1, *range(1, x.dim() - 1))",
    "x = x.transpose(-1, 1).contiguous().transpose(-1, 1).contiguous()",
]  # fmt: skip


@kind("line", 3, line=LINES)
def _line(w: Writer, p: Piece) -> None:
    w.require(w.channels <= 48)
    w.line(p["line"])


# Random draws.

DRAWS = [
    "x = x * torch.empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(0.7).div_(0.7).to(x)",
    "x = x * (torch.rand(x.shape[0], *[1] * (x.dim() - 1)) + 0.7).floor().to(x)",
    "x = x * torch.bernoulli(torch.full([1] * x.dim(), 0.5)).to(x) + 0.5 * x",
    "x = x + 0.1 * torch.randn_like(x)",
    "x = x + 0.1 * torch.randn(1, *x.shape[1:]).to(x)",
    "x = x * (torch.rand_like(x) > 0.3)",
    "x = x * torch.normal(1.0, 0.1, (x.shape[0], x.shape[1], *[1] * (x.dim() - 2))).to(x)",
    "x = F.dropout(x, 0.3, self.training)",
    "x = F.dropout2d(x.flatten(2).unsqueeze(-1), 0.3, self.training).view(x.shape)",
    "x = F.alpha_dropout(x, 0.2, self.training)",
    "x = F.feature_alpha_dropout(x, 0.2, self.training)",
    "x = x[:, torch.randperm(x.shape[1])]",
    "x = x + torch.empty_like(x).uniform_(-0.1, 0.1)",
    "x = x * torch.empty(x.shape[1]).exponential_().view(1, -1, *[1] * (x.dim() - 2)).to(x)",
]  # fmt: skip


@kind("draw", 2, line=DRAWS)
def _draw(w: Writer, p: Piece) -> None:
    w.line(p["line"])


@kind("dropout", 1, how=["nn.Dropout(0.2)", "nn.Dropout(0.2, inplace=True)", "nn.Dropout{dims}d(0.3)"])
def _dropout(w: Writer, p: Piece) -> None:
    w.layer("drop", p["how"].format(dims=w.dims))


# What is changed in the forward.


@kind("counter", 0.7)
def _counter(w: Writer, p: Piece) -> None:
    steps = w.buffer("steps", "torch.zeros(())")
    w.line(f"{steps}.add_(1)")
    w.line(f"x = x / (1 + 0.1 * {steps})")


@kind("moving_average", 0.7, read=["before", "after"])
def _moving_average(w: Writer, p: Piece) -> None:
    mean, dims = w.buffer("mean", f"torch.zeros({w.channels})"), (0, *range(2, 2 + w.dims))
    lines = [f"{mean}.mul_(0.9).add_(x.detach().mean({dims}).to({mean}), alpha=0.1)",
             f"x = x - {mean}.view(1, -1, {'1, ' * w.dims})"]  # fmt: skip
    for line in lines if p["read"] == "after" else lines[::-1]:
        w.line(line)


@kind("parameter", 0.7)
def _parameter(w: Writer, p: Piece) -> None:
    """A scale of the layer, as ConvNeXt's."""
    scale = w.attribute("scale", f"nn.Parameter(torch.full(({w.channels}, {'1, ' * w.dims}), 0.5))")
    w.line(f"x = x * {scale}")


@kind("graph_break", 0.4)
def _graph_break(w: Writer, p: Piece) -> None:
    w.require(not any(line.startswith("def") for line in w.lines))
    w.lines.append("torch._dynamo.graph_break()")


# What has a body.


@kind("residual", 2, scale=["", "0.5 * "])
def _residual(w: Writer, p: Piece) -> None:
    before = w.name("h")
    w.line(f"{before} = x")
    _body(w, p)
    w.require(w.x.shape[2:] == w.values[before].shape[2:])
    if w.channels != w.values[before].shape[1]:
        skip = w.attribute("skip", f"nn.Conv{w.dims}d({w.values[before].shape[1]}, {w.channels}, 1)")
        return w.line(f"x = {p['scale']}x + {skip}({before})")
    return w.line(f"x = {p['scale']}x + {before}")


@kind("dense", 1)
def _dense(w: Writer, p: Piece) -> None:
    before = w.name("h")
    w.line(f"{before} = x")
    _body(w, p)
    w.line(f"x = torch.cat([x, {before}], 1)")


@kind("unet", 1.2, down=["pool", "stride"], up=["nearest", "transposed"])
def _unet(w: Writer, p: Piece) -> None:
    before, dims = w.name("h"), w.dims
    w.line(f"{before} = x")
    if p["down"] == "pool":
        w.line(f"x = F.max_pool{dims}d(x, 2)")
    else:
        w.layer("down", f"nn.Conv{dims}d({w.channels}, {2 * w.channels}, 3, stride=2, padding=1)")
    _body(w, p)
    if p["up"] == "transposed":
        w.layer("up", f"nn.ConvTranspose{dims}d({w.channels}, {w.channels}, 2, stride=2)")
    w.line(f"x = F.interpolate(x, size={before}.shape[2:])")
    w.line(f"x = torch.cat([x, {before}], 1)")


@kind("checkpoint", 0.6)
def _checkpoint(w: Writer, p: Piece) -> None:
    with w.method() as name:
        _body(w, p)
        own = set(w.values)
    w.require(not any("graph_break" in line or ".add_" in line for line in w.methods[-1]) and own >= {"x"})
    w.lines.append(f"x = checkpoint(self.{name}, x, use_reentrant=False)")


NESTED = {"residual", "dense", "unet", "checkpoint"}
