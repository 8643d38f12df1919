"""The second table of probes.py: the time of a layer that holds probes of its input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness.codes import blank, described, folds
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from xconv_fx.measure import interleaved_times
from xconv_fx.ops import SavedAs, codec_of
from xconv_fx.ops.conv import input_gradient, weight_gradient
from xconv_fx.units import format_size

TIME_GOAL = 1.1
# 3x3 convolutions: stride, padding, dilation, transposed, output padding, groups.
GEOMETRY: Any = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
# Dense probes that are timed, and the layer that is.
FEW_PROBES = 64
TIMED_SIZE = (16, 64, 56, 56)
EXACT, FEW = "the input: exact", f"{FEW_PROBES} Gaussian probes"


def probed_convolution(held: SavedAs) -> Callable[..., Tensor]:
    """`convolution(x, weight, bias, seed)` that holds a payload for its backward, in the two halves of the backend."""
    row = codec_of(held.spec.codec)

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
    dense = blank(x, "probe").varied(kind="gaussian", probes=FEW_PROBES)
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
