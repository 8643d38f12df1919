"""Collect what is measured of one layer over batches, and make its `LayerStatistics` of it.

What codecs do is noise relative to E; over batches it is averaged weighted with E, so that batches with large gradients
count for more, as they do in the noise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xconv_fx.codec_set import BITS
from xconv_fx.errors import UnsupportedModelError
from xconv_fx.statistics import Fold, LayerStatistics, Layout, Pairs, Spread

from .moments import (
    BATCH_NORM,
    INSTANCE_NORM,
    PART,
    Bilinear,
    codes,
    deviation,
    folds,
    orders,
    rounding_errors,
    sample_noise,
    spread,
)

# Errors that are sent backward from a normalisation layer: of codes of so many bits, so many times.
TRAVEL_BITS, TRAVEL_DRAWS = 2, 4
Backward = Callable[[Tensor], Mapping[str, Tensor]]


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
    sources: Iterable[tuple[str, nn.Module, Tensor]] = (),
) -> Tensor:
    """Measure a call of a convolution or linear layer; its weight gradient.

    `rows`: dim 0 are the batch's samples. `sources` are normalisation layers from whose outputs x may have been made
    by an activation, and their inputs.
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
        replays = tuple((name, _replayed(norm, given, x, reach)) for name, norm, given in sources)
        measurement.runs.append(replace(found, replays=replays))
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


def _replayed(norm: nn.Module, given: Tensor, x: Tensor, weights: Tensor) -> Pairs:
    """(bits, v): the noise of x, of elements with these weights, when it is replayed from codes of what `norm` read.

    Activations pass errors on where x is not zero, which holds for a rectifier, also of a sum.
    """
    *_, scale = _statistics(norm, given)
    part = _part(x, weights)
    passed = weights[part] * (_scaled(norm, scale.expand_as(given))[part] * (x[part] != 0)).square()
    energy = float((x[part].square() * weights[part]).sum())
    return tuple(
        (bits, sum(float((e.square() * passed).sum()) for e in rounding_errors(given[part], bits, 1)) / energy)
        for bits in BITS
    )


def _part(x: Tensor, weights: Tensor) -> Tensor:
    """The samples that codecs are run on: as many as fit into `PART` elements, those of most energy first."""
    count = max(1, PART // x[0].numel())
    energies = (x.square() * weights).flatten(1).sum(1)
    return energies.topk(min(count, len(x))).indices.sort().values


def measure_normalisation(
    measurement: Measurement, module: nn.Module, x: Tensor, dy: Tensor, weight_gradients: Backward
) -> None:
    """Measure a call of a normalisation layer with input `x` and output gradient `dy`.

    With x^ the normalised input and g the output gradient times the layer's weight, the input gradient is
    (g - mean(g) - x^ mean(g x^)) / sigma over each set that is normalised together. An error of x enters it twice: as
    it is, times a mean that is small, and through that mean times x^, which is small as well but adds up in the weight
    gradient of the layer before. So errors are drawn, and sent backward by `weight_gradients`: from a gradient of x to
    the weight gradients of the layers before.
    """
    mean, scale = _statistics(module, x)
    g, sets = _scaled(module, dy), functools.partial(_set_mean, module)

    def input_gradient(held: Tensor) -> Tensor:
        normal = (held - mean) * scale
        return (g - sets(g) - normal * sets(g * normal)) * scale

    exact = input_gradient(x)
    energy, passed = float(x.square().sum()), float(exact.square().sum())
    if not (energy > 0 and passed > 0 and math.isfinite(energy) and math.isfinite(passed)):
        return
    travel, reaches = 0.0, dict[str, float]()
    for error in rounding_errors(x, TRAVEL_BITS, TRAVEL_DRAWS):
        change = input_gradient(x + error) - exact
        unit = TRAVEL_DRAWS * float(error.square().sum()) / energy
        if unit == 0:
            continue
        travel += float(change.square().sum()) / passed / unit
        for name, gradient in weight_gradients(change).items():
            reaches[name] = reaches.get(name, 0.0) + float(gradient.square().sum()) / unit
    part = _part(x, torch.ones_like(x))
    ones = torch.ones_like(x[part])
    layouts = {name: Layout(codes(x[part], ones, order)) for name, order in orders(x).items()}
    found = LayerStatistics(
        measurement.weight, len(x), layouts, energy, travel=travel, reaches=tuple(sorted(reaches.items()))
    )
    measurement.runs.append(found)


def reads_its_input(module: nn.Module) -> bool:
    """Whether the backward of a normalisation layer reads its input; by running statistics it does not."""
    return not isinstance(module, (BATCH_NORM, INSTANCE_NORM)) or module.training or not module.track_running_stats


def _scaled(module: nn.Module, dy: Tensor) -> Tensor:
    weight = getattr(module, "weight", None)
    if weight is None:
        return dy
    shape = weight.shape if isinstance(module, nn.LayerNorm) else (-1, *(1 for _ in dy.shape[2:]))
    return dy * weight.detach().to(dy.dtype).view(shape)


def _statistics(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation that each element of `x` is normalised with, in shapes that broadcast to it."""
    mean = _set_mean(module, x)
    variance = _set_mean(module, (x - mean).square())
    return mean, (variance + module.eps).rsqrt()  # type: ignore[operator]


def _set_mean(module: nn.Module, x: Tensor) -> Tensor:
    """For each element the mean over what is normalised together with it."""
    if isinstance(module, nn.GroupNorm):
        groups = x.unflatten(1, (module.num_groups, -1))
        return groups.mean(list(range(2, groups.dim())), keepdim=True).expand_as(groups).reshape(x.shape)
    if isinstance(module, nn.LayerNorm):
        return x.mean(list(range(x.dim() - len(module.normalized_shape), x.dim())), keepdim=True)
    first = [0] if isinstance(module, BATCH_NORM) else []
    return x.mean([*first, *range(2, x.dim())], keepdim=True)
