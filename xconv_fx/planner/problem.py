"""Pose the planning problem of a pair in numbers: steps, bytes, noise and time of every way to hold every residual.

The steps are the forward's followed by the backward's (`passes/liveness.py`). What no choice changes is the base:
parameters, inputs, results, gradients, transients. Every residual adds a load from its production to its last reader in
the backward, of its own bytes when it is kept, of its payload when it is not; and once more its own bytes wherever a
decoded tensor must exist because an extern kernel reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import fx

from xconv_fx.cost_model.device import DeviceSpec
from xconv_fx.cost_model.memory import Item, Option, Problem, profile
from xconv_fx.cost_model.timing import seconds
from xconv_fx.device import rates
from xconv_fx.ops import samples
from xconv_fx.ops.codec import SavedAs, codec_of
from xconv_fx.ops.fold import fitted
from xconv_fx.options import Options
from xconv_fx.options.codecs import XCONV_PROBES
from xconv_fx.passes.find_norms import Norm, find_norms
from xconv_fx.passes.graph import (
    arguments,
    is_elementwise,
    is_primal,
    is_reduction,
    is_tangent,
    nbytes,
    numel,
    output_node,
    tensor_of,
)
from xconv_fx.passes.late_layout import layout_copies
from xconv_fx.passes.liveness import Timeline, timeline
from xconv_fx.passes.partition import Pair
from xconv_fx.passes.rematerialize import RecomputeSubgraph, find_recompute_subgraph
from xconv_fx.passes.residuals import Residual, small
from xconv_fx.passes.step_time import step_seconds
from xconv_fx.plan import Choice

from . import probe_ladder
from .loss import Ends
from .peak_scenarios import ONCE, Calls
from .sensitivities import EXACT, NoiseContribution, Sensitivities
from .surroundings import ALONE, Surroundings

aten = torch.ops.aten


@dataclass(frozen=True)
class StorageCandidate:
    """One way to hold one residual: a `Choice`, what it costs at which steps, and what noise it adds where.

    A value that is replayed from codes needs them to have so many `bits`; a "replay" does with more
    (`dependencies.py`).
    """

    choice: Choice
    option: Option
    added: NoiseContribution = EXACT
    bits: int = 0


def items_of(residuals: Iterable[Residual], rows: Iterable[tuple[StorageCandidate, ...]]) -> tuple[Item, ...]:
    """The solver's items: the residuals with the options of their candidates."""
    return tuple(
        Item(residual.name, tuple(candidate.option for candidate in row))
        for residual, row in zip(residuals, rows, strict=True)
    )


@dataclass(frozen=True)
class PlanningProblem:
    """The problem for the solver, and what its items and options stand for.

    `chains` and `norms` belong to residuals, by name; `phases` names the phase of every step. `ends` is what the
    forward returns, as a loss has it, `calls` how often the graph runs in a step; `rest` are bytes that cross to the
    backward besides the residuals, whatever is chosen. `seconds` is what the forward and the backward take by the
    roofline when everything is kept; `noises` how much noise matters. Of what is alive in the loss, `spare` bytes are
    left free for others.
    """

    problem: Problem
    residuals: tuple[Residual, ...]
    candidates: tuple[tuple[StorageCandidate, ...], ...]
    chains: dict[str, RecomputeSubgraph]
    norms: dict[str, Norm]
    fixed_bytes: int
    device: str
    phases: tuple[str, ...]
    ends: Ends
    rest: int
    seconds: Mapping[str, float]
    noises: Sensitivities
    calls: Calls = ONCE
    spare: int = 0

    def steps(self, phase: str) -> list[int]:
        """The steps of a phase: "forward", "loss" or "backward"."""
        return [step for step, name in enumerate(self.phases) if name == phase]

    def phase_peaks(self, choice: tuple[int, ...]) -> dict[str, int]:
        """The predicted peak of the forward, the loss and the backward."""
        alive = profile(self.problem, choice)
        return {phase: int(alive[self.steps(phase)].max(initial=0)) for phase in ("forward", "loss", "backward")}

    def taken(self) -> Problem:
        """The problem without what is left free."""
        base = self.problem.base
        rest = (size - self.spare * (phase == "loss") for size, phase in zip(base, self.phases, strict=True))
        return replace(self.problem, base=tuple(rest))

    def baseline_peak(self) -> int:
        """The predicted peak with everything kept, in bytes."""
        return max(self.phase_peaks((0,) * len(self.residuals)).values())


def build_problem(
    pair: Pair, residuals: Mapping[str, Residual], options: Options, apart: bool = False, goes_on: bool = False
) -> PlanningProblem:
    """The planning problem of the pair, beside nothing.

    `apart` says that samples are known to be computed apart, `goes_on` that the results go on into further code of the
    model.
    """
    return _ProblemBuilder(pair, residuals, options, apart, goes_on).build()


def resident_bytes(nodes: Iterable[fx.Node]) -> int:
    """Parameters, buffers and inputs among the nodes: alive during the whole step."""
    return sum(nbytes(node) for node in nodes if is_primal(node))


def corrected(planning: PlanningProblem, corrections: Mapping[str, int]) -> PlanningProblem:
    """The problem with its phases found short of so many bytes."""
    if not corrections:
        return planning
    base = (
        size + corrections.get(phase, 0) for size, phase in zip(planning.problem.base, planning.phases, strict=True)
    )
    return replace(planning, problem=replace(planning.problem, base=tuple(base)))


def beside(planning: PlanningProblem, around: Surroundings) -> PlanningProblem:
    """The problem of a graph that was posed alone, with this alive besides the graph's own tensors."""
    if around == ALONE:
        return planning
    more = {
        "forward": around.throughout,
        "loss": around.throughout + around.inside + around.spare,
        "backward": around.throughout + around.returning,
    }
    return replace(
        corrected(planning, more),
        fixed_bytes=planning.fixed_bytes + around.throughout,
        spare=planning.spare + around.spare,
    )


class _ProblemBuilder:
    def __init__(
        self, pair: Pair, residuals: Mapping[str, Residual], options: Options, apart: bool, goes_on: bool
    ) -> None:
        self.pair, self.options, self.apart = pair, options, apart
        total = sum(residual.bytes for residual in residuals.values())
        self.large = {name: r for name, r in residuals.items() if not small(r, total)}
        self.index = {name: i for i, name in enumerate(self.large)}
        self.forward = timeline(pair.forward.graph, [r.forward for r in self.large.values()])
        self.backward = timeline(pair.backward.graph)
        self.turn = len(self.forward.steps) + 1
        self.end = self.turn + len(self.backward.steps) - 1
        self.last_in_forward = {buffer.node: buffer.last for buffer in self.forward.buffers}
        saved = set(pair.saved())
        self.chains = {name: chain for name, r in self.large.items() if (chain := self._chain(r, saved)) is not None}
        self.norms = find_norms(self.large.values()) if "fixed" in options.codecs else {}
        tangents = [n for n in pair.backward.graph.find_nodes(op="placeholder") if is_tangent(n)]
        results = arguments(output_node(pair.forward.graph))[0][: pair.results]
        self.ends = Ends.of([node for node in results if isinstance(node, fx.Node)], tangents, goes_on)
        # The loss gives them contiguous; AOTAutograd copies those that the graph wants otherwise.
        self.relaid = sum(nbytes(n) for n in tangents if (v := tensor_of(n)) is not None and not v.is_contiguous())
        crossing = pair.residuals().items()
        self.rest = sum(nbytes(node) for name, (node, _) in crossing if name not in self.large)
        self.copies = layout_copies(pair.forward)
        self.noises = Sensitivities(self.large, options.stats, pair)
        self.machine: DeviceSpec = rates.spec(self._device())

    def _device(self) -> str:
        values = (tensor_of(node) for node in self.pair.forward.graph.nodes)
        return next((str(value.device) for value in values if value is not None), "cpu")

    def _chain(self, residual: Residual, saved: set[str]) -> RecomputeSubgraph | None:
        chain = find_recompute_subgraph(residual.forward, saved - {residual.name})
        if chain is None or any(name not in self.large for name in chain.sources):
            return None
        return chain

    def build(self) -> PlanningProblem:
        rows = tuple(tuple(self._candidates(residual)) for residual in self.large.values())
        base = self._base()
        labels = (*(n.name for n in self.forward.steps), "the loss", *(n.name for n in self.backward.steps))
        phases = ("forward",) * len(self.forward.steps) + ("loss",) + ("backward",) * len(self.backward.steps)
        fixed = resident_bytes(self.pair.forward.graph.nodes)
        residuals = tuple(self.large.values())
        problem = Problem(tuple(base), items_of(residuals, rows), labels)
        return PlanningProblem(
            problem, residuals, rows, self.chains, self.norms, fixed, self._device(), phases,
            ends=self.ends, rest=self.rest + self.copies,
            seconds={"forward": step_seconds(self.forward, self.machine),
                     "backward": step_seconds(self.backward, self.machine)},
            noises=self.noises,
        )  # fmt: skip

    def _base(self) -> list[int]:
        constant = resident_bytes(self.pair.forward.graph.nodes) + self.copies
        held = self.rest + self.ends.results
        forward = [constant + b for b in self.forward.profile()]
        after = constant + held + self.ends.kept + self.ends.tangents + self.relaid
        backward = [after + b for b in self.backward.profile()]
        return [*forward, constant + held + self.ends.between, *backward]

    # One method a codec family: each yields the candidates that are legal for the residual.

    def _candidates(self, residual: Residual) -> list[StorageCandidate]:
        keep = self._candidate(residual, "keep", residual.bytes, decoded=False, traffic=0)
        row = [keep]
        fixed = self._asked(residual)
        if fixed is not None and residual.uses <= {"weight_grad", "mask"}:
            # A preset chooses among the row; the user's number leaves no choice.
            return [*([keep] if self.options.codecs.preset else []), self._probe(residual, fixed)]
        allowed = self.options.codecs
        if "bitmask" in allowed and residual.uses == {"mask"}:
            row.append(self._bitmask(residual))
        if "bitmask" in allowed and not allowed.preset and residual.uses == {"mask", "weight_grad"}:
            row += self._masks_apart(residual)
        if residual.name in self.chains:
            row += self._recomputed(residual, self.chains[residual.name])
        if residual.name in self.norms and "nonlinear" not in residual.uses:
            row += self._fixed(residual, self.norms[residual.name])
        if (
            residual.uses <= {"mask"}
            or "nonlinear" in residual.uses
            or ("mask" in residual.uses and "bitmask" not in allowed)
        ):
            return row
        if "quantize" in allowed:
            row += [self._coded(residual, self._codes(residual, bits)) for bits in allowed.bits]
        if "probe" in allowed and residual.uses <= {"weight_grad", "mask"}:
            blank = SavedAs("probe", **self._held(residual))
            probe_candidates = probe_ladder.probe_candidates(
                blank, allowed.kinds, lambda held: self.noises.coded(residual, held).total
            )
            row += [self._coded(residual, held) for held in probe_candidates]
        return row

    def _asked(self, residual: Residual) -> int | None:
        """How many probes must be held of a residual: what the user says, or the preset `xconv` of convolutions."""
        if "weight_grad" not in residual.uses:
            return None
        count = self.options.probes.count_among(residual.readers)
        if not self.options.codecs.preset.startswith("xconv"):
            return count
        return (count or XCONV_PROBES) if residual.convolved else None

    def _held(self, residual: Residual) -> dict[str, Any]:
        return {"size": residual.shape, "dtype": residual.value.dtype, "order": residual.order}

    def _fixed_held(self, residual: Residual, bits: int) -> SavedAs:
        return SavedAs("fixed", **self._held(residual), bits=bits)

    def _codes(self, residual: Residual, bits: int) -> SavedAs:
        held = self._held(residual)
        if not self.options.shares_samples or not samples.shareable(residual.shape, residual.order, bits):
            return SavedAs("quantize", **held, bits=bits)
        return SavedAs("quantize", **held, bits=bits, by_sample="apart" if self.apart else "mixed")

    def _bitmask(self, residual: Residual) -> StorageCandidate:
        count = 1 if residual.value.dtype.itemsize == 1 else len(residual.masks)
        size = count * _packed_bytes(residual.forward)
        return self._candidate(residual, "bitmask", size, decoded=False, traffic=residual.bytes + 2 * size)

    def _masks_apart(self, residual: Residual) -> list[StorageCandidate]:
        """The tensor until the weight gradients are computed, and bits for the masks that are read later.

        They are read with the input gradient, which is where backwards peak.
        """
        steps = {node: self.turn + step for step, node in enumerate(self.backward.steps)}
        readers = [steps.get(user, self.end) for user in residual.backward.users if user not in residual.masks]
        last = max(readers, default=self.end)
        if last >= self._last(residual):
            return []
        masks = len(residual.masks) * _packed_bytes(residual.forward)
        held = self._candidate(residual, "bitmask", masks, decoded=False, traffic=2 * masks)
        tensor = (self._produced(residual, kept=True), last, residual.bytes)
        option = replace(held.option, loads=(tensor, *held.option.loads))
        choice = replace(held.choice, bytes_after=residual.bytes + masks)
        return [replace(held, choice=choice, option=option)]

    def _coded(self, residual: Residual, held: SavedAs) -> StorageCandidate:
        codec = codec_of(held.codec)
        masks = len(residual.masks) * _packed_bytes(residual.forward)
        candidate = self._candidate(
            residual,
            held.codec,
            codec.payload_bytes(held) + masks,
            decoded=True,
            added=self.noises.coded(residual, held),
            traffic=codec.traffic(held) + 2 * masks,
        )
        choice = replace(
            candidate.choice, bits=held.bits, probes=held.probes, kind=held.kind if held.codec == "probe" else None,
            means=held.means, by_sample=held.by_sample,
        )  # fmt: skip
        return replace(candidate, choice=choice)

    def _probe(self, residual: Residual, probes: int) -> StorageCandidate:
        """As many probes as the user asks for, of the first kind that is allowed."""
        kinds = self.options.codecs.kinds
        kind = "fold" if "fold" in kinds or not kinds else kinds[0]
        probes, means = fitted(residual.shape, probes, kind)
        return self._coded(residual, SavedAs("probe", **self._held(residual), probes=probes, kind=kind, means=means))

    def _fixed(self, residual: Residual, norm: Norm) -> list[StorageCandidate]:
        """Codes that carry the sign of the normalisation's result, for which no bits are held."""
        masks = [mask for mask in residual.masks if norm.tells(mask) is None]
        if masks and "bitmask" not in self.options.codecs:
            return []
        row = []
        for bits in self.options.codecs.fixed_bits:
            held = self._fixed_held(residual, bits)
            codec = codec_of(held.codec)
            size = codec.payload_bytes(held) + norm.table_bytes + len(masks) * _packed_bytes(residual.forward)
            candidate = self._candidate(
                residual,
                "fixed",
                size,
                decoded=True,
                traffic=codec.traffic(held),
                added=self.noises.coded(residual, held),
            )
            row.append(replace(candidate, choice=replace(candidate.choice, bits=bits)))
        return row

    def _recomputed(self, residual: Residual, chain: RecomputeSubgraph) -> list[StorageCandidate]:
        allowed, sources = self.options.codecs, [self.large[name] for name in chain.sources]
        if chain.reruns:
            return [self._rerun(residual, chain, sources)] if "recompute" in allowed else []
        row = [self._replay(residual, chain, "recompute")] if "recompute" in allowed else []
        if not sources or chain.masks is None or any("nonlinear" in r.uses for r in (residual, *sources)):
            return row
        masks = {_bits_name(mask): mask for mask in (*residual.masks, *chain.masks)}.values()
        if {"recompute", "quantize", "bitmask"} <= allowed.names:
            for bits in (b for b in allowed.bits if b > 1):  # One bit is too coarse.
                codes = [(source, self._codes(source, bits)) for source in sources]
                added = self.noises.replayed(residual, codes)
                row.append(self._replay(residual, chain, "replay", bits, added, len(masks)))
        # Other sources count as exact, although they may be in codes as well.
        normed = [source for source in sources if source.name in self.norms]
        norms = [self.norms[source.name] for source in normed]
        unsigned = [mask for mask in masks if all(norm.tells(mask) is None for norm in norms)]
        if norms and ("bitmask" in allowed or not unsigned):
            for bits in allowed.fixed_bits:
                added = self.noises.replayed(residual, [(source, self._fixed_held(source, bits)) for source in normed])
                row.append(self._replay(residual, chain, "signed", bits, added, len(unsigned)))
        return row

    def _replay(
        self,
        residual: Residual,
        chain: RecomputeSubgraph,
        name: str,
        bits: int = 0,
        added: NoiseContribution = EXACT,
        masks: int = 0,
    ) -> StorageCandidate:
        """The residual made again from others; `name` and `bits` say from which, `masks` how many it needs."""
        size = chain.extra_bytes + masks * _packed_bytes(residual.forward)
        candidate = self._candidate(residual, "recompute", size, decoded=True, traffic=chain.traffic, added=added)
        last, sources = self._last(residual), [self.large[source] for source in chain.sources]
        extended = tuple(
            (self._last(source) + 1, last, source.bytes) for source in sources if self._last(source) < last
        )
        # A source's own options are not known yet: `needs` is filled in by `link`, once all rows exist.
        option = replace(candidate.option, name=name, loads=candidate.option.loads + extended)
        return replace(candidate, option=option, bits=bits)

    def _rerun(self, residual: Residual, chain: RecomputeSubgraph, sources: list[Residual]) -> StorageCandidate:
        """Run the convolution again before its result is first read; from then on it is held like any value."""
        candidate = self._candidate(residual, "recompute", chain.extra_bytes, decoded=False, traffic=0)
        followers = (r for name, r in self.large.items() if residual.name in self._cheap_sources(name))
        first = min(step for r in (residual, *followers) for step in self._read(r))
        last = self._last(residual)
        loads = [*candidate.option.loads, (first, last, residual.bytes)]
        loads += [(first, first, source.bytes) for source in sources]
        loads += [(self._last(s) + 1, first, s.bytes) for s in sources if self._last(s) < first]
        time = seconds(chain.flops, chain.traffic, self.machine, str(residual.value.dtype))
        option = replace(candidate.option, name="rerun", loads=tuple(loads), time=time)
        return replace(candidate, choice=replace(candidate.choice, time=time), option=option)

    def _cheap_sources(self, name: str) -> tuple[str, ...]:
        chain = self.chains.get(name)
        return () if chain is None or chain.reruns else chain.sources

    def _candidate(
        self,
        residual: Residual,
        codec: str,
        size: int,
        *,
        decoded: bool,
        traffic: int,
        added: NoiseContribution = EXACT,
    ) -> StorageCandidate:
        kept = codec == "keep"
        loads = [(self._produced(residual, kept), self._last(residual), size)]
        if decoded:
            loads += [(step, step, residual.bytes) for step in self._materialised(residual)]
        time = seconds(0, traffic, self.machine) if traffic else 0.0
        dtype = str(residual.value.dtype).removeprefix("torch.")
        choice = Choice(
            residual.name, residual.layer, residual.source, residual.shape, dtype,
            tuple(sorted(residual.uses)), codec, residual.bytes, size, noise=added.noise, time=time,
            readers=residual.readers,
        )  # fmt: skip
        layers = self.noises.relative(added)
        return StorageCandidate(choice, Option(codec, tuple(loads), added.total, time, layers=layers), added)

    def _produced(self, residual: Residual, kept: bool) -> int:
        """First step at which the payload exists; for a kept tensor, the first that the base does not count."""
        if kept and residual.forward in self.last_in_forward:
            return min(self.last_in_forward[residual.forward] + 1, self.end)
        return min(self.forward.step_of(residual.forward), self.end)

    def _read(self, residual: Residual) -> list[int]:
        return [self.turn + step for step in self.backward.read_at.get(residual.backward, [0])]

    def _last(self, residual: Residual) -> int:
        return max(self._read(residual))

    def _materialised(self, residual: Residual) -> list[int]:
        """Steps at which an extern kernel reads the residual, so that a decoded tensor must exist."""
        return [step for step in self._read(residual) if not _is_generated(self.backward, step - self.turn)]


def _is_generated(line: Timeline, step: int) -> bool:
    return is_elementwise(line.steps[step]) or is_reduction(line.steps[step])


def _bits_name(mask: fx.Node) -> str:
    """What tells apart the bits that are held: those of a ReLU are those of its backward's `relu(x) <= 0`."""
    rectified = mask.target is aten.le.Scalar and arguments(mask)[1] == 0
    return mask.all_input_nodes[0].name if rectified else mask.name


def _packed_bytes(node: fx.Node) -> int:
    return 4 * ceil(numel(node) / 32)
