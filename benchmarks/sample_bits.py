"""What would codes of another width for each sample of a batch gain, at equal bytes? An estimate, on trained networks.

ActNN (Chen et al., ICML 2021, section 4.2) shares bits out among samples as well as layers, by their sensitivities
R^2 |dy|^2: R the ranges of a sample's groups of 256 values, dy the gradient of the layer's result. dy is not known when
codes are made: ActNN's default leaves it out, its option `use_gradient` takes it from the last epoch. For the inputs of
the convolutions, linear and normalisation layers of a trained network of the fidelity study this prints the variance
that rounding adds to weight gradients, relative to equal widths (median and extremes over layers), when widths of 1, 2,
4 and 8 bits are shared out in every batch

    ranges     by R^2 alone
    gradients  by R^2 |dy|^2 of the same step, as if that were known

Variances are the sums of R^2 |dy|^2 / (2^b - 1)^2 by which ActNN chooses, not drawn. Bits are shared out greedily, so
that a few may be left over: then a ratio can be above 1.

    python benchmarks/sample_bits.py classification inpainting
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from fidelity_tasks import STUDIES
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

WIDTHS = (1, 2, 4, 8)
AVERAGES = (2, 4)
GROUP = 256
BATCHES = 8
LAYERS = (
    nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, nn.BatchNorm2d, nn.InstanceNorm3d,
)  # fmt: skip

Sensitivities = list[tuple[Tensor, Tensor]]


def noise(width: Tensor | int) -> Any:
    return 1 / (2.0**width - 1) ** 2


def shared_out(weights: Tensor, average: int) -> Tensor:
    """The widths of least noise, each sample's weighed: bits go where the next ones take most noise away."""
    costs = [high - low for low, high in itertools.pairwise(WIDTHS)]
    worth = [(noise(a) - noise(b)) / (b - a) for a, b in itertools.pairwise(WIDTHS)]
    order = (weights[:, None] * weights.new_tensor(worth)).flatten().argsort(descending=True, stable=True)
    taken = torch.tensor(costs).repeat(len(weights))[order]
    given = torch.zeros_like(taken)
    given[order] = taken * (taken.cumsum(0) <= (average - WIDTHS[0]) * len(weights))
    return WIDTHS[0] + given.view(len(weights), -1).sum(1)


def squared_ranges(x: Tensor) -> Tensor:
    """The sum over a sample's groups: (samples,)."""
    flat = x.flatten(1)
    groups = flat.split(GROUP, 1)
    return torch.stack([(g.amax(1) - g.amin(1)).square() * g.shape[1] for g in groups]).sum(0).double()


def measure(task: Any, steps: int) -> dict[str, Sensitivities]:
    """R^2 and |dy|^2 of the samples of some batches, for every layer of a network trained for so many steps."""
    torch.manual_seed(0)
    model, generator = task.build(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=task.learning_rate)

    def step() -> None:
        inputs, target = task.batch(generator)
        optimiser.zero_grad()
        task.loss(model(*((inputs,) if isinstance(inputs, Tensor) else inputs)), target).backward()
        optimiser.step()

    for _ in range(steps):
        step()
    found: dict[str, Sensitivities] = {}

    def ran(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ranges = squared_ranges(inputs[0].detach())

        def arrived(dy: Tensor) -> None:
            found.setdefault(name, []).append((ranges, dy.flatten(1).double().square().sum(1)))

        output.register_hook(arrived)

    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_hook(functools.partial(ran, name))
    for _ in range(BATCHES):
        step()
    return found


def ratio(layer: Sensitivities, average: int, by_gradients: bool) -> float:
    """The variance of widths shared out in every batch, relative to that of equal widths."""
    shared = equal = 0.0
    for ranges, gradients in layer:
        widths = shared_out(ranges * gradients if by_gradients else ranges, average)
        shared += float((ranges * gradients * noise(widths)).sum())
        equal += float((ranges * gradients).sum() * noise(average))
    return shared / equal


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("task", nargs="*", default=list(STUDIES), help=f"of {', '.join(STUDIES)}; default: all")
    chosen = parse.parse_args().task
    if unknown := set(chosen) - set(STUDIES):
        parse.error(f"task: {', '.join(sorted(unknown))}: must be of {', '.join(STUDIES)}")
    torch.set_num_threads(1)
    table = Table("task", "samples", *(f"{a} bits, {by}" for a in AVERAGES for by in ("ranges", "gradients")))
    for name in chosen:
        layers = measure(STUDIES[name].make(), STUDIES[name].steps).values()
        cells = [
            spread([ratio(layer, average, by_gradients) for layer in layers])
            for average in AVERAGES
            for by_gradients in (False, True)
        ]
        table.add_row(name, str(len(next(iter(layers))[0][0])), *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
