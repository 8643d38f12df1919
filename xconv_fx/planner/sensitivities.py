"""What a coded residual adds to the noise of the gradients, layer by layer.

Joins how the backward reads a residual (`residuals.py`) with how noisy a codec makes it (`noise/expected.py`) and how
much that matters (`cost_model/noise.py`): from the statistics of the layers that were measured, the option `stats`, and
from priors for all others. The errors of "fixed" are those that were measured with the real codec, where they were.

Known gaps: noises of several residuals are added up. Those of "fixed" are not independent: with 2 bits, what several
normalisation layers add to an earlier layer was up to 1.7 times as much. Of scales of normalisation layers nothing is
measured: with statistics their noise is not counted. A residual that is read as it is by a weight
gradient and held as "fixed" has a prior there; one that is replayed from a normalisation layer and something else
counts that as exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.cost_model.noise import SCALE, Use
from xconv_fx.errors import OptionError
from xconv_fx.noise.expected import expected_noise, measured_noise
from xconv_fx.ops.codec import SavedAs
from xconv_fx.ops.fixed import normal_error
from xconv_fx.ops.quantize import bits_of
from xconv_fx.options.codecs import FIXED_BITS
from xconv_fx.options.statistics import LayerStatistics, Statistics
from xconv_fx.passes.partition import Pair
from xconv_fx.passes.residuals import Residual
from xconv_fx.passes.trained_layers import TrainedLayers


@dataclass(frozen=True)
class NoiseContribution:
    """What holding one residual adds. `noise` is relative to its energy, `total` its part of the plan's noise, and
    `layers` that of each layer's gradient, by name, whether the layer reads the residual or runs before."""

    noise: float = 0.0
    total: float = 0.0
    layers: tuple[tuple[str, float], ...] = ()


EXACT = NoiseContribution()


@dataclass(frozen=True)
class _Reading:
    """A use of a residual, by which layer ("" if unknown), and what was measured of that (None: nothing).

    For normalisations, `squares` is what squares of the noise add to `use`, and `fixed` the use where the residual is
    held as "fixed" in so many bits, as far as that was measured.
    """

    use: Use
    layer: str = ""
    known: LayerStatistics | None = None
    squares: tuple[tuple[str, float], ...] = ()
    fixed: Mapping[int, Use] = field(default_factory=dict)

    def use_of(self, held: SavedAs, noise: float) -> Use:
        """The use of a residual that is held so, with this noise."""
        if held.spec.codec == "fixed":
            return self.fixed.get(held.spec.bits or 0, self.use)
        squares = dict(self.squares)
        reaches = tuple((layer, share + noise * squares.get(layer, 0.0)) for layer, share in self.use.reaches)
        return Use(self.use.kind, reaches)

    def noise(self, held: SavedAs, rectified: bool) -> float:
        """Relative noise energy of a residual that is held so, as this use sees it."""
        if self.known is None or held.spec.codec == "fixed":
            return expected_noise(held, rectified=rectified)
        return measured_noise(held, self.known)


# The name of all gradients that are none of a layer's weights or scales.
OTHERS = "other gradients"


class Sensitivities:
    """How much the noise of each residual of the pair matters.

    What travels reaches all layers that run before. `shares` are the layers' parts of the yardstick. Raises
    `OptionError` when there are statistics, but of none of the layers here.
    """

    def __init__(self, residuals: Mapping[str, Residual], stats: Statistics | None, pair: Pair) -> None:
        self.stats = stats
        self.readings: dict[str, tuple[_Reading, ...]] = {}
        self.trained = TrainedLayers.of(pair, residuals)
        self.made = {name: residual.forward for name, residual in residuals.items()}
        self.prior = 1 / max(1, sum(self.trained.weights.values()))
        self.shares = self._shares()
        for name, residual in residuals.items():
            own = (*self._weights(residual), *self._scales(residual))
            self.readings[name] = (*own, *self._travelling(residual, self._before(residual)))
        self._check()

    @property
    def _total(self) -> float:
        """The yardstick: all SGD noise."""
        return 0.0 if self.stats is None else self.stats.sgd

    def _known(self, layers: Iterable[str]) -> dict[str, LayerStatistics]:
        measured = {} if self.stats is None else self.stats.layers
        return {layer: measured[layer] for layer in layers if layer in measured}

    def _shares(self) -> dict[str, float]:
        """Every layer's part of the yardstick: as measured, or by the prior. Of scales nothing is measured."""
        measured = {} if self.stats is None else self.stats.layers
        known = {name: layer.sgd / self._total for name, layer in measured.items() if layer.travel is None}
        weights = {name: count * self.prior for name, count in self.trained.weights.items() if name not in known}
        scales = [] if measured else [name for row in self.trained.scales.values() for name in row]
        return {**dict.fromkeys(scales, SCALE * self.prior), **weights, **known}

    def _before(self, residual: Residual) -> list[tuple[str, float]]:
        """The layers that run before the residual is made, and what they gain where a gradient arrives with an error
        as large as itself: by the prior their share."""
        scaled = {name: self.made[source] for source, row in self.trained.scales.items() for name in row}
        known, runs = self._known(self.shares), self.trained.runs

        def is_before(name: str) -> bool:
            if name in scaled:
                return scaled[name] < residual.forward
            return not residual.forward < runs[name] if name in runs else name not in known

        return [
            (name, known[name].arriving / self._total if name in known else share)
            for name, share in self.shares.items()
            if is_before(name)
        ]

    def _weights(self, residual: Residual) -> list[_Reading]:
        """The uses by weight gradients, one a layer."""
        if "weight_grad" not in residual.uses:
            return []
        known = {name: layer for name, layer in self._known(residual.readers).items() if layer.travel is None}
        found = []
        for name in residual.readers or ("",):
            if name in known:
                share = known[name].energy / self._total
                found.append(_Reading(Use("weight", ((name, share),)), name, known[name]))
            else:
                found.append(_Reading(Use("weight", ((name, self.prior),)), name))
        return found

    def _scales(self, residual: Residual) -> list[_Reading]:
        """The uses by gradients of scales of normalisation layers."""
        names = [name for name in self.trained.scales.get(residual.name, ()) if name in self.shares]
        return [_Reading(Use("scale", ((name, self.shares[name]),)), name) for name in names]

    def _travelling(self, residual: Residual, earlier: Sequence[tuple[str, float]]) -> list[_Reading]:
        """The uses whose errors reach the layers before: measured ones for themselves, all others by priors.

        With no layer before, what the error reaches is some other gradient, which counts as one layer's: of scales
        that are parameters of a model itself, of slopes, of the network's input.
        """
        found = []
        if not earlier and residual.name not in self.trained.scales:
            self.shares.setdefault(OTHERS, self.prior)
            earlier = [(OTHERS, self.prior)]
        known = {name: layer for name, layer in self._known(residual.norms).items() if layer.travel is not None}
        for name, layer in known.items() if "norm" in residual.uses else ():
            found.append(self._measured_norm(name, layer))
        for kind in ("norm", "other"):
            if kind in residual.uses and not (kind == "norm" and known):
                found.append(_Reading(Use.travelling(kind, earlier)))
        return found

    def _measured_norm(self, name: str, layer: LayerStatistics) -> _Reading:
        """What was measured of "fixed" are squared errors; a use is relative to the noise that the codec states."""

        def shares(variances: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
            return tuple((before, variance / self._total) for before, variance in variances)

        fixed = {
            bits: Use(
                "norm", shares((before, dict(errors)[bits] / normal_error(bits)) for before, errors in layer.fixed)
            )
            for bits in FIXED_BITS
            if layer.fixed
        }
        return _Reading(Use("norm", shares(layer.reaches)), name, layer, shares(layer.squares), fixed)

    def _check(self) -> None:
        layers = dict.fromkeys(r.layer for row in self.readings.values() for r in row if r.use.kind == "weight")
        if self.stats is None or not any(layers) or self._known(layers):
            return
        some, others = (", ".join([*names][:4]) for names in (filter(None, layers), self.stats.layers))
        hint = "measure the module that is compiled, with xconv calibrate or xconv_fx.calibrate"
        raise OptionError("stats", others, f"none of these layers is in the graph, which has {some}; {hint}")

    def coded(self, residual: Residual, spec: CodecSpec) -> NoiseContribution:
        """What holding the residual so adds."""
        held = residual.saved_as(spec)
        rectified = held.spec.codec != "fixed" and residual.uses <= {"weight_grad", "mask"}
        readings = self.readings[residual.name]
        noises = [(reading, reading.noise(held, rectified)) for reading in readings]
        return _sum([(reading.use_of(held, noise), noise) for reading, noise in noises])

    def replayed(self, residual: Residual, sources: Sequence[tuple[Residual, CodecSpec]]) -> NoiseContribution:
        """What replaying the residual from sources that are held so adds.

        By the prior it is as noisy as the noisiest of them.
        """
        prior = max(expected_noise(source.saved_as(spec), rectified=False) for source, spec in sources)
        noises = []
        for reading in self.readings[residual.name]:
            found = [_replayed(reading.known, source, spec) for source, spec in sources]
            known = [noise for noise in found if noise is not None]
            noises.append((reading.use, sum(known) if len(known) == len(found) else prior))
        return _sum(noises)

    def unmeasured(self) -> tuple[str, ...]:
        """The layers with weight gradients whose noise is a prior although there are statistics."""
        if self.stats is None:
            return ()
        weights = [r for row in self.readings.values() for r in row if r.use.kind == "weight" and r.known is None]
        return tuple(dict.fromkeys(reading.layer or "a layer without a name" for reading in weights))

    def relative(self, added: NoiseContribution) -> tuple[tuple[str, float], ...]:
        """What a residual adds to each layer, relative to the layer's own part of the yardstick."""
        noise: dict[str, float] = {}
        for layer, amount in added.layers:
            noise[layer] = noise.get(layer, 0.0) + amount
        return tuple((name, found / self.shares[name]) for name, found in noise.items() if self.shares.get(name))

    def by_layer(self, added: Iterable[NoiseContribution]) -> tuple[tuple[str, float], ...]:
        """The same of all that every residual adds."""
        return self.relative(NoiseContribution(layers=tuple(row for found in added for row in found.layers)))


def _replayed(reader: LayerStatistics | None, source: Residual, spec: CodecSpec) -> float | None:
    """The noise of a reader's input that is replayed from a source that is held so; None if it was not measured."""
    replays = () if reader is None else reader.fixed if spec.codec == "fixed" else reader.replays
    known = {norm: dict(noises) for norm, noises in replays if noises}
    return next((known[norm][bits_of(source.saved_as(spec))] for norm in source.norms if norm in known), None)


def _sum(noises: list[tuple[Use, float]]) -> NoiseContribution:
    return NoiseContribution(
        noise=max((noise for _, noise in noises), default=0.0),
        total=sum(noise * use.sensitivity for use, noise in noises),
        layers=tuple((layer, noise * share) for use, noise in noises for layer, share in use.reaches),
    )
