"""What is known of a model's gradients on its user's data: measured by `xconv_fx.calibrate`, read by the planner.

One entry a layer. A codec replaces the layer's input x by x + e with E[e] = 0; the weight gradient, which is linear in
x, gains the variance sum over elements of D E[e^2], where an element's D is the sum of the squared output gradients
that it meets. (Errors of different elements are independent when codes are rounded; what correlation random projections
leave is measured apart.) The energy E = sum of D x^2 is that of an error as large as the input, so that every codec has
a *relative noise energy* v = variance / E. What v depends on is measured too:

* codes: v itself, of a real rounding, for each width;
* folded sums: v relative to its closed form for independent values, and the same of rounding the sums, for a few
  numbers of terms; for the input and for its deviations from the channels' means;
* dense projections: the closed form's input, the energies of x and D of each sample, and, since one projection serves
  all samples, of pairs of samples.

Each depends on how the tensor lies in memory, because groups of codes and terms of a sum are neighbours there.

`sgd` is the yardstick: the variance of the weight gradient over batches of the size that was measured, summed over its
entries. Errors of a normalisation layer's input go on to the layers before it: its v is relative to the energy of the
input, `travel` is how much an error of v = 1 changes the input gradient, relative to that gradient's energy, and
`reaches` the variance that it adds to the weight gradients of the layers before, by name. Products of errors add
v^2 `squares`: nothing but for codes of one bit, whose errors are larger than the input.

The codec "fixed" rounds deterministically, and its errors are correlated. `fixed` is what they change on the data that
was measured: squared errors of weight gradients, not variances.

A file is JSON with a format number and, as a fingerprint, the shape of every layer's weight. Nothing here needs torch.

Sources: ActNN (Chen et al., ICML 2021) measures sensitivities in the same way for its allocation of bits.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xconv_fx.errors import OptionError

from . import join_clauses, nearest

if TYPE_CHECKING:
    from torch import nn

FORMAT = 2
LAYOUTS = ("contiguous", "channels_last")
HINT = "write the file of `xconv calibrate --output FILE`, or what xconv_fx.calibrate returned"

Pairs = tuple[tuple[int, float], ...]
ByLayer = tuple[tuple[str, Pairs], ...]


@dataclass(frozen=True)
class Fold:
    """Folding with `terms` elements a sum: measured noise over the closed form's, of plain `folding` and of `rounding`
    the sums, by bits."""

    terms: float
    folding: float
    rounding: Pairs


@dataclass(frozen=True)
class Layout:
    """Noise of what depends on the order in memory: `codes`, v by bits; folds of the input and of its `deviations`."""

    codes: Pairs
    folds: tuple[Fold, ...] = ()
    deviations: tuple[Fold, ...] = ()


@dataclass(frozen=True)
class Spread:
    """What the noise of dense projections is proportional to, relative to the energy E.

    For L values a sample: `own` is the sum over samples of |x|^2 sum(D) / L and `cross` the same of pairs of samples
    (their scalar products), `coherent` that of the squared weight gradients of single samples over L.
    """

    own: float
    cross: float
    coherent: float


@dataclass(frozen=True)
class LayerStatistics:
    """One layer. `weight` is its weight's shape, () without one; `samples` is how many a batch had.

    For layers with a weight gradient: `energy` is E, `flat` the same for an error that is spread evenly over the input,
    `arriving` for one that arrives with the output gradient, of its energy and evenly spread; `gradient` the squared
    norm of the mean gradient, `sgd` the variance of a batch's gradient; `plain` and `deviation` are for dense
    projections of the input and of its deviations from the channels' means; `replays` is v by bits where the input is
    replayed, through a rectifier, from codes of what a normalisation layer read, by that layer's name, and `fixed` the
    same where that is held as "fixed" (no bits: it cannot be).

    For normalisation layers `energy` is that of the input, and `travel`, `reaches` and `squares` are set instead, and
    `fixed` by layers before: the squared errors of their gradients, by bits. `layouts` is by name, of `LAYOUTS`.
    """

    weight: tuple[int, ...]
    samples: int
    layouts: Mapping[str, Layout] = field(hash=False)
    energy: float = 0.0
    flat: float = 0.0
    arriving: float = 0.0
    gradient: float = 0.0
    sgd: float = 0.0
    plain: Spread | None = None
    deviation: Spread | None = None
    travel: float | None = None
    reaches: tuple[tuple[str, float], ...] = ()
    squares: tuple[tuple[str, float], ...] = ()
    replays: ByLayer = ()
    fixed: ByLayer = ()

    def layout(self, order: tuple[int, ...]) -> Layout:
        """What was measured for a tensor whose dims lie in memory in this order, outermost first."""
        last = len(order) > 3 and order[-1] == 1
        return self.layouts.get("channels_last" if last else "contiguous") or next(iter(self.layouts.values()))

    def reached(self, noise: float) -> tuple[tuple[str, float], ...]:
        """The layers before that errors of this v reach, with the variance that is added for each unit of v."""
        squares = dict(self.squares)
        return tuple((name, variance + noise * squares.get(name, 0.0)) for name, variance in self.reaches)


@dataclass(frozen=True)
class Statistics:
    """Statistics of a model's layers by name, as means over `batches` batches."""

    layers: Mapping[str, LayerStatistics] = field(hash=False)
    batches: int = 1

    @property
    def sgd(self) -> float:
        """The variance of a batch's gradient, summed over all layers."""
        return sum(layer.sgd for layer in self.layers.values())

    def check(self, model: nn.Module) -> None:
        """Raise `OptionError` unless the model has every layer, with a weight of the same shape."""
        known = dict(model.named_modules())
        for name, layer in self.layers.items():
            if name not in known:
                raise _mismatch(name, join_clauses("the model has no such layer,", nearest(name, known)).rstrip(","))
            weight = getattr(known[name], "weight", None)
            shape = () if weight is None else tuple(weight.shape)
            if shape != layer.weight:
                raise _mismatch(name, f"its weight is {_size(shape)}, and was {_size(layer.weight)} when measured")

    def to_json(self) -> str:
        """As JSON text, keys sorted: equal statistics give equal text."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Statistics:
        """Inverse of `to_json`. Raises `ValueError` on anything else."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r} is not {FORMAT}")
            return Statistics({name: _layer(entry) for name, entry in data["layers"].items()}, data["batches"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no statistics of a model: {type(error).__name__}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file. Raises `OSError`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def parse(value: Any) -> Statistics | None:
    """What the option `stats` takes: a path, `Statistics`, or None. Raises `OptionError`."""
    if value is None or isinstance(value, Statistics):
        return value
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise OptionError("stats", value, HINT)
    path = os.fspath(value)
    try:
        return Statistics.from_json(Path(os.fsdecode(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError("stats", str(path), f"cannot be read ({error.strerror}); {HINT}") from error
    except ValueError as error:
        raise OptionError("stats", str(path), f"{error}; {HINT}") from error


def _mismatch(layer: str, reason: str) -> OptionError:
    remedy = "measure this model, with xconv calibrate or xconv_fx.calibrate"
    return OptionError("stats", layer, f"another model's: {reason}; {remedy}")


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "missing"


def _layer(entry: dict[str, Any]) -> LayerStatistics:
    spreads = {name: Spread(**entry[name]) if entry[name] is not None else None for name in ("plain", "deviation")}
    layouts = {name: _layout(layout) for name, layout in entry["layouts"].items()}
    known = {
        "weight": tuple(entry["weight"]),
        "layouts": layouts,
        **{name: tuple((str(layer), float(v)) for layer, v in entry[name]) for name in ("reaches", "squares")},
        **{name: tuple((str(layer), _pairs(v)) for layer, v in entry[name]) for name in ("replays", "fixed")},
    }
    return LayerStatistics(**{**entry, **spreads, **known})


def _layout(entry: dict[str, Any]) -> Layout:
    folds, deviations = (
        tuple(Fold(fold["terms"], fold["folding"], _pairs(fold["rounding"])) for fold in entry[name])
        for name in ("folds", "deviations")
    )
    return Layout(_pairs(entry["codes"]), folds, deviations)


def _pairs(rows: list[list[float]]) -> Pairs:
    return tuple((int(bits), float(value)) for bits, value in rows)
