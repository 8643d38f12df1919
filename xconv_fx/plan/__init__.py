"""The plan: for every residual, how it is held between forward and backward.

A `Plan` is what the planner hands to the rewrite and what every report prints. It is frozen and round-trips
through JSON, so that a plan can be stored, compared and checked in.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xconv_fx.codec_spec import CodecSpec

FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """How one residual is held.

    `residual` is the name of its node in the joint graph, `layer` the path of the module that produced it, `source`
    the line of the user's code that did, as `file.py:line` ("" where it is not known). `uses` are the kinds of
    operation of the backward that read it, `readers` the layers whose weight gradients do. `spec` says how it is held:
    its codec is one of `xconv_fx.options.codecs.CODECS`, or one that was added to the table of `ops.codec`.

    `bytes_before` is what holding the tensor itself takes, `bytes_after` what is held instead (payload, ranges,
    masks). `noise` is the predicted variance that the choice adds, relative to the energy of the residual (0 for
    lossless codecs); `time` the predicted extra seconds a step.
    """

    residual: str
    layer: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[str, ...]
    spec: CodecSpec
    bytes_before: int
    bytes_after: int
    noise: float = 0.0
    time: float = 0.0
    readers: tuple[str, ...] = ()

    @property
    def codec(self) -> str:
        return self.spec.codec

    @property
    def bits(self) -> int | None:
        return self.spec.bits

    @property
    def probes(self) -> int | None:
        return self.spec.probes

    @property
    def kind(self) -> str | None:
        return self.spec.kind

    @property
    def means(self) -> bool:
        return bool(self.spec.means)

    @property
    def by_sample(self) -> str:
        return self.spec.by_sample


@dataclass(frozen=True)
class Plan:
    """Choices for every residual of one compiled graph, and what they add up to. Bytes and seconds.

    `predicted_peak` is computed from the graph before compiling, `audited_peak` from what was generated (None until
    then). `baseline_peak` is the predicted peak with every residual kept as Inductor would. `peak_at` names the
    operation at the predicted peak. `fixed_bytes` are held whatever the plan (parameters, gradients, inputs).
    `noise` adds up the choices', `time` is the predicted extra seconds of a step: the choices', and what recomputing
    and slices add. `gap` is how far the plan's cost is above the solver's lower bound, as a fraction of it (0: proven
    best), `attempts` how many plans were compiled and audited. `notes` names what could not be compressed, and why.

    A step that runs in `slices` of the batch has the choices of one of them. `held_slices` of them hold their residuals
    between forward and backward; the others run their forward again. `saved_share` below 1 is the share of all residual
    bytes that PyTorch's partitioner was allowed to save; what it recomputes instead is no choice of the plan. Times are
    predicted with rates measured on the machine (`calibrated`), or with generic ones. `foreseen` is the predicted over
    the audited peak of the first plan that was generated, before any audit corrected the prediction.

    `noise` is relative to the SGD noise of the model where that was `measured` (the option `stats`), else to the energy
    of the gradients, by a prior; `layers` is that of each layer, relative to its own SGD noise or gradient.

    A graph that runs `calls` times in a step before the backward is planned for what all of these calls hold; the
    choices are those of one. `measured_peak` is what the last training step of the whole model took that was measured,
    losses and optimiser included (None until then).

    `relayout` says that volumes are laid out channels-last, `store_gradients` that gradients which are sums of others
    have memory of their own where that frees more (`passes/stored_gradients.py`), `inductor` that the step is what
    Inductor compiles by itself.

    A plan made ahead may count the state of an `optimizer`, which `fixed_bytes` include, and be for a `gpu`, with the
    memory and rates of its data sheet.
    """

    device: str
    budget: int | None
    baseline_peak: int
    predicted_peak: int
    peak_at: str
    fixed_bytes: int
    choices: tuple[Choice, ...]
    noise: float = 0.0
    time: float = 0.0
    gap: float = 0.0
    attempts: int = 1
    audited_peak: int | None = None
    notes: tuple[str, ...] = ()
    slices: int = 1
    held_slices: int = 1
    saved_share: float = 1.0
    calibrated: bool = False
    foreseen: float | None = None
    optimizer: str | None = None
    optimizer_bytes: int = 0
    gpu: str | None = None
    gpu_memory: int = 0
    measured: bool = False
    layers: tuple[tuple[str, float], ...] = ()
    calls: int = 1
    measured_peak: int | None = None
    relayout: bool = True
    store_gradients: bool = False
    inductor: bool = False

    @property
    def peak(self) -> int:
        """The audited peak where there is one, else the predicted one."""
        return self.predicted_peak if self.audited_peak is None else self.audited_peak

    @property
    def noisiest(self) -> tuple[str, float]:
        """The layer whose gradient gains most noise, and how much; ("", 0) when none gains any."""
        return max(self.layers, key=lambda row: row[1], default=("", 0.0))

    @property
    def saved_before(self) -> int:
        return self.calls * self.slices * sum(choice.bytes_before for choice in self.choices)

    @property
    def saved_after(self) -> int:
        return self.calls * self.held_slices * sum(choice.bytes_after for choice in self.choices)

    def to_json(self) -> str:
        """The plan as JSON text, keys sorted: equal plans give equal text."""
        data = {"format": FORMAT, **vars(self), "choices": [_row(choice) for choice in self.choices]}
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Inverse of `to_json`. Raises `ValueError` on another format version or missing fields."""
        data: dict[str, Any] = json.loads(text)
        if data.pop("format", None) != FORMAT:
            raise ValueError(f"not a plan of format {FORMAT}")
        try:
            choices = tuple(_choice(row) for row in data.pop("choices"))
            layers = tuple((name, noise) for name, noise in data.pop("layers", ()))
            return Plan(**{**data, "choices": choices, "notes": tuple(data["notes"]), "layers": layers})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a plan: {error}") from error


_SPEC = tuple(field.name for field in dataclasses.fields(CodecSpec))


def _row(choice: Choice) -> dict[str, Any]:
    """A choice as JSON has it: the fields of its `spec` lie among its own."""
    row = {**vars(choice), **vars(choice.spec)}
    del row["spec"]
    return row


def _choice(row: dict[str, Any]) -> Choice:
    spec = CodecSpec(**{name: row[name] for name in _SPEC if name in row})
    rest = {name: value for name, value in row.items() if name not in _SPEC}
    lists: dict[str, Any] = {name: tuple(rest[name]) for name in ("shape", "uses", "readers") if name in rest}
    return Choice(**{**rest, **lists}, spec=spec)


@dataclass(frozen=True)
class Totals:
    """The plans of a step's graphs as one: the highest predicted `peak` (bytes) and the most `slices` of any graph, the
    sums of their extra `time` (seconds) and of their `noise`."""

    peak: int
    time: float
    noise: float
    slices: int

    @staticmethod
    def of(plans: Sequence[Plan]) -> Totals:
        return Totals(
            peak=max(plan.predicted_peak for plan in plans),
            time=sum(plan.time for plan in plans),
            noise=sum(plan.noise for plan in plans),
            slices=max(plan.slices for plan in plans),
        )
