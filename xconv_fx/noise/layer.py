"""Collect what is measured of one layer over batches, and make its `LayerStatistics` of it.

Where an input was made from several normalisation layers, as relu(norm(x) + shortcut), the error that each of them
leaves is measured by itself, and exactly; their energies are added up as if they were independent. What else was added
counts as exact.

What codecs do is noise relative to E; over batches it is averaged weighted with E, so that batches with large gradients
count for more, as they do in the noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xconv_fx.errors import UnsupportedModelError
from xconv_fx.options.codecs import BITS, FIXED_BITS
from xconv_fx.options.statistics import Fold, LayerStatistics, Layout, Pairs, Spread

from .moments import PART, Bilinear, codes, deviation, folds, orders, rounding_errors, sample_noise, spread
from .norm_layers import Normalisation, holds_fixed

# Errors that are sent backward from a normalisation layer: of codes of so many bits, so many times, and their products.
TRAVEL_BITS, TRAVEL_DRAWS, SQUARES_DRAWS = 2, 6, 2
Backward = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Source:
    """A normalisation layer and its input; `signed` says whether an activation reads its result."""

    name: str
    module: nn.Module
    x: Tensor
    signed: bool


@dataclass
class Measurement:
    """One layer over all batches: `weight` is its weight's shape, `runs` the statistics of single calls, `within` the
    SGD noise as estimated inside of batches, and the rest adds up the `batches` gradients and their `squares`."""

    weight: tuple[int, ...]
    runs: list[LayerStatistics] = field(default_factory=list)
    within: list[float] = field(default_factory=list)
    batches: int = 0
    total: Tensor | None = None
    squares: float = 0.0

    def add_gradient(self, gradient: Tensor) -> None:
        """The weight gradient of a whole batch."""
        self.batches += 1
        self.squares += float(gradient.square().sum())
        self.total = gradient if self.total is None else self.total + gradient

    def statistics(self, name: str) -> LayerStatistics:
        """The means over batches. Raises `UnsupportedModelError` when the SGD noise of the layer cannot be told."""
        energies = [run.energy for run in self.runs]
        found = _mean(self.runs, [energy / sum(energies) for energy in energies])
        found = replace(found, energy=sum(energies) / len(energies))  # Not weighted with itself.
        if self.total is None:
            return found
        gradient = float((self.total / self.batches).square().sum())
        if self.within:
            sgd = sum(self.within) / self.batches
        elif self.batches > 1:
            sgd = (self.squares - self.batches * gradient) / (self.batches - 1)
        else:
            reason = "one batch does not tell its SGD noise: its input has no row for each of several samples"
            raise UnsupportedModelError(name, reason, "two batches or more, or a batch of several samples")
        return replace(found, gradient=gradient, sgd=sgd)


def _mean(values: Sequence[Any], weights: Sequence[float]) -> Any:
    """The weighted mean of all floats in structures that are alike; whatever else is in them is the first's."""
    first = values[0]
    if isinstance(first, float):
        return sum(weight * value for weight, value in zip(weights, values, strict=True))
    if isinstance(first, tuple):
        # A batch whose images are smaller may have been folded into fewer terms.
        return tuple(_mean(column, weights) for column in zip(*values, strict=False))
    if isinstance(first, Mapping):
        return {key: _mean([value[key] for value in values], weights) for key in first}
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [item.name for item in dataclasses.fields(first)]
        return type(first)(**{name: _mean([getattr(value, name) for value in values], weights) for name in names})
    return first


def measure_weighted(
    measurement: Measurement,
    module: nn.Module,
    x: Tensor,
    dy: Tensor,
    rows: bool,
    sources: Iterable[Source] = (),
) -> Tensor:
    """Measure a call of a convolution or linear layer; its weight gradient.

    `rows`: dim 0 are the batch's samples. `sources` are the normalisation layers from whose outputs x was made by
    activations and sums.
    """
    if x.dim() == (1 if isinstance(module, nn.Linear) else len(measurement.weight) - 1):
        x, dy = x.unsqueeze(0), dy.unsqueeze(0)
    layer = Bilinear.of(module, x, dy)
    gradient, own = layer.gradient(x, dy), layer.energies(x, dy)
    if rows:
        measurement.within.append(sample_noise(own, gradient))
    reach = layer.reach(x, dy)
    energy = float((x.square() * reach).sum())
    if energy > 0 and math.isfinite(energy):
        found = _call(measurement.weight, layer, x, dy, reach, own, energy)
        replays, fixed = [], []
        for source in sources:
            norm = Normalisation.of(source.module, source.x)
            replays.append((source.name, _replayed(norm, x, reach)))
            fixed.append((source.name, _replayed_fixed(layer, norm, source.signed, x, dy, energy)))
        measurement.runs.append(replace(found, replays=tuple(replays), fixed=tuple(fixed)))
    return gradient


def _call(
    weight: tuple[int, ...], layer: Bilinear, x: Tensor, dy: Tensor, reach: Tensor, own: Tensor, energy: float
) -> LayerStatistics:
    views = [(x, own)]
    if (rest := deviation(x)) is not None:
        views.append((rest, layer.energies(rest, dy)))
    spreads: list[Spread | None] = [spread(layer, view, dy, energies, energy) for view, energies in views]
    part = _part(x, reach)
    weights = reach[part]
    scale = float((x[part].square() * weights).sum())
    layouts = {}
    for name, order in orders(x).items():
        folded: list[tuple[Fold, ...]] = []
        for view, energies in views:
            shared = float(energies[part].sum() - (view[part].square() * weights).sum())
            folded.append(tuple(folds(view[part], weights, order, shared, layer.channel, scale)))
        layouts[name] = Layout(codes(x[part], weights, order), *folded)
    flat = float(x.square().mean() * reach.sum())
    even = layer.reach(x, dy.square().mean().sqrt().expand_as(dy))
    arriving = float((x.square() * even).sum())
    plain, without = spreads[0], spreads[1] if len(spreads) > 1 else None
    return LayerStatistics(weight, len(x), layouts, energy, flat, arriving, plain=plain, deviation=without)


def _replayed(norm: Normalisation, x: Tensor, weights: Tensor) -> Pairs:
    """(bits, v): the noise of x, of elements with these weights, when it is replayed from codes of what `norm` read.

    Activations pass errors on where x is not zero, which holds for a rectifier, also of a sum.
    """
    part = _part(x, weights)
    passed = weights[part] * (norm.slope[part] * (x[part] != 0)).square()
    energy = float((x[part].square() * weights[part]).sum())
    return tuple(
        (bits, sum(float((e.square() * passed).sum()) for e in rounding_errors(norm.x[part], bits, 1)) / energy)
        for bits in BITS
    )


def _replayed_fixed(layer: Bilinear, norm: Normalisation, signed: bool, x: Tensor, dy: Tensor, energy: float) -> Pairs:
    """The same of what `norm` read as "fixed": its errors are no draws, so that this is what the gradient is off by."""
    if not holds_fixed(norm.module, norm.x):
        return ()
    passed = norm.slope * (x != 0)
    return tuple(
        (bits, float(layer.gradient(norm.fixed_error(bits, signed) * passed, dy).square().sum()) / energy)
        for bits in FIXED_BITS
    )


def _part(x: Tensor, weights: Tensor) -> Tensor:
    """The samples that codecs are run on: as many as fit into `PART` elements, those of most energy first."""
    count = max(1, PART // x[0].numel())
    energies = (x.square() * weights).flatten(1).sum(1)
    return energies.topk(min(count, len(x))).indices.sort().values


def measure_normalisation(
    measurement: Measurement, module: nn.Module, x: Tensor, dy: Tensor, weight_gradients: Backward, signed: bool = False
) -> None:
    """Measure a call of a normalisation layer with input `x` and output gradient `dy`.

    Errors of the input are sent backward by `weight_gradients`: from a gradient of x to the weight gradients of the
    layers before. Those of codes are drawn. Those of "fixed", which knows whether an activation behind the layer needs
    its result's sign, `signed`, are what they are.
    """
    norm = Normalisation.of(module, x)
    energy, passed = float(x.square().sum()), float(norm.input_gradient(dy).square().sum())
    if not (energy > 0 and passed > 0 and math.isfinite(energy) and math.isfinite(passed)):
        return
    travel = 0.0
    reaches, squares = defaultdict[str, float](float), defaultdict[str, float](float)
    for draw, error in enumerate(rounding_errors(x, TRAVEL_BITS, TRAVEL_DRAWS)):
        unit = float(error.square().sum()) / energy
        if unit == 0:
            continue
        change, product = norm.changes(dy, error, even=True)
        travel += float(change.square().sum()) / passed / unit / TRAVEL_DRAWS
        for name, gradient in weight_gradients(change).items():
            reaches[name] += float(gradient.square().sum()) / unit / TRAVEL_DRAWS
        for name, gradient in weight_gradients(product).items() if draw < SQUARES_DRAWS else ():
            squares[name] += float(gradient.square().sum()) / unit**2 / SQUARES_DRAWS
    fixed = defaultdict[str, list[tuple[int, float]]](list)
    for bits in FIXED_BITS if holds_fixed(module, x) else ():
        for name, gradient in weight_gradients(norm.change(dy, norm.fixed_error(bits, signed))).items():
            fixed[name].append((bits, float(gradient.square().sum())))
    # All elements count the same, so any samples will do; of those of most energy more would be lost to coding.
    part = x[:: max(1, x.numel() // PART)]
    ones = torch.ones_like(part)
    layouts = {name: Layout(codes(part, ones, order)) for name, order in orders(x).items()}
    found = LayerStatistics(
        measurement.weight, len(x), layouts, energy, travel=travel,
        reaches=tuple(sorted(reaches.items())), squares=tuple(sorted(squares.items())),
        fixed=tuple((name, tuple(errors)) for name, errors in sorted(fixed.items())),
    )  # fmt: skip
    measurement.runs.append(found)
