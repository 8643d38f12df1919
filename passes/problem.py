"""Pose the planning problem of a pair in numbers: steps, bytes, noise and time of every way to hold every residual.

The steps are the forward's followed by the backward's (`lifetimes.py`). What no choice changes is the base: parameters,
inputs, results, gradients, transients. Every residual adds a load from its production to its last reader in the
backward, of its own bytes when it is kept, of its payload when it is not; and once more its own bytes wherever a
decoded tensor must exist because an extern kernel reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from torch import fx

from xconv_fx import calibration
from xconv_fx.cost_model.device import DeviceSpec
from xconv_fx.cost_model.memory import Item, Option, Problem, profile
from xconv_fx.cost_model.timing import seconds
from xconv_fx.ops import registry
from xconv_fx.ops.registry import Held
from xconv_fx.options import Options
from xconv_fx.plan import Choice

from . import rungs
from .graph import (
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
from .layouts import layout_copies
from .lifetimes import Timeline, timeline
from .partition import Pair
from .recompute import Chain, find_chain
from .residuals import Residual, small
from .sensitivities import EXACT, Added, Sensitivities
from .step_time import step_seconds

# Tensors of the results' size that a loss outside the graph holds at once between forward and backward: for cross
# entropy the log-probabilities and two gradients.
LOSS_COPIES = 3


@dataclass(frozen=True)
class Candidate:
    """One way to hold one residual: a `Choice`, what it costs at which steps, and what noise it adds where.

    A value that is replayed from codes needs them to have so many `bits`, or more.
    """

    choice: Choice
    option: Option
    added: Added = EXACT
    bits: int = 0


def items_of(residuals: Iterable[Residual], rows: Iterable[tuple[Candidate, ...]]) -> tuple[Item, ...]:
    """The solver's items: the residuals with the options of their candidates."""
    return tuple(
        Item(residual.name, tuple(candidate.option for candidate in row))
        for residual, row in zip(residuals, rows, strict=True)
    )


@dataclass(frozen=True)
class Posed:
    """The problem for the solver, and what its items and options stand for.

    `phases` names the phase of every step. In bytes: `results` and `tangents`, what the forward returns and the
    gradients of that; `rest`, what crosses to the backward besides the residuals, whatever is chosen. `seconds` is what
    the forward and the backward take by the roofline when everything is kept; `noises` how much noise matters.
    """

    problem: Problem
    residuals: tuple[Residual, ...]
    candidates: tuple[tuple[Candidate, ...], ...]
    chains: dict[str, Chain]
    fixed_bytes: int
    device: str
    phases: tuple[str, ...]
    results: int
    tangents: int
    rest: int
    seconds: Mapping[str, float]
    noises: Sensitivities

    def steps(self, phase: str) -> list[int]:
        """The steps of a phase: "forward", "loss" or "backward"."""
        return [step for step, name in enumerate(self.phases) if name == phase]

    def phase_peaks(self, choice: tuple[int, ...]) -> dict[str, int]:
        """The predicted peak of the forward, the loss and the backward."""
        alive = profile(self.problem, choice)
        return {phase: int(alive[self.steps(phase)].max(initial=0)) for phase in ("forward", "loss", "backward")}

    def baseline_peak(self) -> int:
        """The predicted peak with everything kept, in bytes."""
        return max(self.phase_peaks((0,) * len(self.residuals)).values())


def pose(
    pair: Pair,
    residuals: dict[str, Residual],
    options: Options,
    outside: int = 0,
    corrections: Mapping[str, int] | None = None,
) -> Posed:
    """The planning problem of the pair.

    `outside` is what is alive throughout besides this graph's tensors, `corrections` what audits found the model to be
    short of in each phase; both in bytes.
    """
    return _Poser(pair, residuals, options, outside, corrections or {}).pose()


def resident_bytes(nodes: Iterable[fx.Node]) -> int:
    """Parameters, buffers and inputs among the nodes: alive during the whole step."""
    return sum(nbytes(node) for node in nodes if is_primal(node))


class _Poser:
    def __init__(
        self,
        pair: Pair,
        residuals: dict[str, Residual],
        options: Options,
        outside: int,
        corrections: Mapping[str, int],
    ) -> None:
        self.pair, self.options, self.corrections = pair, options, corrections
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
        self.outside = outside
        self.results = self._results()
        tangents = [n for n in pair.backward.graph.find_nodes(op="placeholder") if is_tangent(n)]
        self.tangents = sum(map(nbytes, tangents))
        # The loss gives them contiguous; AOTAutograd copies those that the graph wants otherwise.
        self.relaid = sum(nbytes(n) for n in tangents if (v := tensor_of(n)) is not None and not v.is_contiguous())
        crossing = pair.residuals().items()
        self.rest = sum(nbytes(node) for name, (node, _) in crossing if name not in self.large)
        self.copies = layout_copies(pair.forward)
        self.noises = Sensitivities(self.large, options.stats, pair.forward.graph)
        self.machine: DeviceSpec = calibration.spec(self._device())

    def _device(self) -> str:
        values = (tensor_of(node) for node in self.pair.forward.graph.nodes)
        return next((str(value.device) for value in values if value is not None), "cpu")

    def _chain(self, residual: Residual, saved: set[str]) -> Chain | None:
        chain = find_chain(residual.forward, saved - {residual.name})
        if chain is None or any(name not in self.large for name in chain.sources):
            return None
        return chain

    def pose(self) -> Posed:
        rows = tuple(tuple(self._candidates(residual)) for residual in self.large.values())
        base = self._base()
        labels = (*(n.name for n in self.forward.steps), "the loss", *(n.name for n in self.backward.steps))
        phases = ("forward",) * len(self.forward.steps) + ("loss",) + ("backward",) * len(self.backward.steps)
        fixed = resident_bytes(self.pair.forward.graph.nodes) + self.outside
        residuals = tuple(self.large.values())
        problem = Problem(tuple(base), items_of(residuals, rows), labels)
        return Posed(
            problem, residuals, rows, self.chains, fixed, self._device(), phases,
            results=self.results, tangents=self.tangents, rest=self.rest + self.copies,
            seconds={"forward": step_seconds(self.forward, self.machine),
                     "backward": step_seconds(self.backward, self.machine)},
            noises=self.noises,
        )  # fmt: skip

    def _results(self) -> int:
        results = arguments(output_node(self.pair.forward.graph))[0][: self.pair.results]
        nodes = dict.fromkeys(node for node in results if isinstance(node, fx.Node))
        return sum(nbytes(node) for node in nodes if not is_primal(node))

    def _base(self) -> list[int]:
        constant = resident_bytes(self.pair.forward.graph.nodes) + self.outside + self.copies
        more = {phase: constant + self.corrections.get(phase, 0) for phase in ("forward", "loss", "backward")}
        held = self.rest + self.results
        forward = [more["forward"] + b for b in self.forward.profile()]
        backward = [more["backward"] + held + self.tangents + self.relaid + b for b in self.backward.profile()]
        return [*forward, more["loss"] + held + LOSS_COPIES * self.tangents, *backward]

    # One method a codec family: each yields the candidates that are legal for the residual.

    def _candidates(self, residual: Residual) -> list[Candidate]:
        keep = self._candidate(residual, "keep", residual.bytes, decoded=False, traffic=0)
        row = [keep]
        fixed = self.options.probes.count_for(residual.reader) if "weight_grad" in residual.uses else None
        if fixed is not None and residual.uses <= {"weight_grad", "mask"}:
            return [self._probe(residual, fixed)]
        allowed = self.options.codecs
        if "bitmask" in allowed and residual.uses == {"mask"}:
            row.append(self._bitmask(residual))
        if "recompute" in allowed and residual.name in self.chains:
            row += self._recomputed(residual, self.chains[residual.name])
        if (
            residual.uses <= {"mask"}
            or "nonlinear" in residual.uses
            or ("mask" in residual.uses and "bitmask" not in allowed)
        ):
            return row
        if "quantize" in allowed:
            row += [self._coded(residual, Held("quantize", **self._held(residual), bits=bits)) for bits in allowed.bits]
        if "probe" in allowed and residual.uses <= {"weight_grad", "mask"}:
            blank = Held("probe", **self._held(residual))
            offered = rungs.offered(blank, allowed.kinds, lambda held: self.noises.coded(residual, held).total)
            row += [self._coded(residual, held) for held in offered]
        return row

    def _held(self, residual: Residual) -> dict[str, Any]:
        salt = self.index[residual.name] + 1
        return {"size": residual.shape, "dtype": residual.value.dtype, "order": residual.order, "salt": salt}

    def _bitmask(self, residual: Residual) -> Candidate:
        count = 1 if residual.value.dtype.itemsize == 1 else len(residual.masks)
        size = count * _packed_bytes(residual.forward)
        return self._candidate(residual, "bitmask", size, decoded=False, traffic=residual.bytes + 2 * size)

    def _coded(self, residual: Residual, held: Held) -> Candidate:
        codec = registry.codec(held.codec)
        masks = sum(_packed_bytes(residual.forward) for _ in residual.masks)
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
            means=held.means,
        )  # fmt: skip
        return replace(candidate, choice=choice)

    def _probe(self, residual: Residual, probes: int) -> Candidate:
        """As many probes as the user asks for, of the first kind that is allowed."""
        kinds = self.options.codecs.kinds
        kind = "fold" if "fold" in kinds or not kinds else kinds[0]
        length = numel(residual.forward) // residual.shape[0]
        means = kind == "fold" and len(residual.shape) > 2 and probes < length
        return self._coded(
            residual, Held("probe", **self._held(residual), probes=min(probes, length), kind=kind, means=means)
        )

    def _recomputed(self, residual: Residual, chain: Chain) -> list[Candidate]:
        sources = [(self.index[name], self.large[name]) for name in chain.sources]
        if chain.reruns:
            return [self._rerun(residual, chain, [source for _, source in sources])]
        row = [self._replay(residual, chain, sources)]
        allowed = self.options.codecs
        lossy = (
            "quantize" in allowed
            and "bitmask" in allowed
            and sources
            and chain.masks is not None
            and all("nonlinear" not in r.uses for r in (residual, *(source for _, source in sources)))
        )
        if lossy:
            row += [self._replay(residual, chain, sources, bits) for bits in allowed.bits if bits > 1]
        return row

    def _replay(
        self, residual: Residual, chain: Chain, sources: list[tuple[int, Residual]], bits: int | None = None
    ) -> Candidate:
        """Replay from exact sources, or from codes of so many bits; one bit is too coarse."""
        size, added = chain.extra_bytes, EXACT
        if bits is not None:
            size += _packed_bytes(residual.forward) * len({*residual.masks, *(chain.masks or ())})
            codes = [(source, Held("quantize", **self._held(source), bits=bits)) for _, source in sources]
            added = self.noises.replayed(residual, codes)
        candidate = self._candidate(residual, "recompute", size, decoded=True, traffic=chain.traffic, added=added)
        last = self._last(residual)
        extended = tuple(
            (self._last(source) + 1, last, source.bytes) for _, source in sources if self._last(source) < last
        )
        # A source's own options are not known yet: `needs` is filled in by `link`, once all rows exist.
        name = "recompute" if bits is None else "replay"
        option = replace(candidate.option, name=name, loads=candidate.option.loads + extended)
        return replace(candidate, option=option, bits=bits or 0)

    def _rerun(self, residual: Residual, chain: Chain, sources: list[Residual]) -> Candidate:
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
        self, residual: Residual, codec: str, size: int, *, decoded: bool, traffic: int, added: Added = EXACT
    ) -> Candidate:
        kept = codec == "keep"
        loads = [(self._produced(residual, kept), self._last(residual), size)]
        if decoded:
            loads += [(step, step, residual.bytes) for step in self._materialised(residual)]
        time = seconds(0, traffic, self.machine) if traffic else 0.0
        dtype = str(residual.value.dtype).removeprefix("torch.")
        choice = Choice(
            residual.name, residual.layer, residual.source, residual.shape, dtype,
            tuple(sorted(residual.uses)), codec, residual.bytes, size, noise=added.noise, time=time,
        )  # fmt: skip
        return Candidate(choice, Option(codec, tuple(loads), added.total, time), added)

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


def _packed_bytes(node: fx.Node) -> int:
    return 4 * ceil(numel(node) / 32)


def link(posed: Posed) -> Posed:
    """Fill in what replayed residuals need of their sources.

    A "recompute" needs exact ones, a "replay" codes of its width or wider. A "rerun" needs sources that are kept, or
    replayed from kept ones: one convolution is run again at a time, never a whole forward.
    """
    index = {residual.name: i for i, residual in enumerate(posed.residuals)}
    named = dict(zip(index, posed.candidates, strict=True))
    # First which options are left, then their places: a source with a fixed codec may allow nothing.
    left = {
        name: tuple(c for c in row if all(allowed for _, allowed in _sources(posed, named, name, c)))
        for name, row in named.items()
    }
    rows = tuple(
        tuple(
            replace(c, option=replace(c.option, needs=tuple(
                (index[source], allowed) for source, allowed in _sources(posed, left, name, c)
            )))
            for c in row
        )
        for name, row in left.items()
    )  # fmt: skip
    return replace(posed, candidates=rows, problem=replace(posed.problem, items=items_of(posed.residuals, rows)))


_EXACT = frozenset({"keep", "recompute", "rerun"})
_NEEDS = {"recompute": _EXACT, "replay": _EXACT | {"quantize"}, "rerun": frozenset({"keep", "recompute"})}


def _sources(
    posed: Posed, rows: Mapping[str, tuple[Candidate, ...]], name: str, candidate: Candidate
) -> list[tuple[str, frozenset[int]]]:
    """What a candidate of the residual `name` is replayed from, and the places of the options that those may take."""
    needed = _needed(posed, name, candidate).items()
    return [(source, _allowed(rows[source], names, candidate.bits)) for source, names in needed]


def _needed(posed: Posed, name: str, candidate: Candidate) -> dict[str, frozenset[str]]:
    """The options that a candidate of the residual `name` needs others to take."""
    names = _NEEDS.get(candidate.option.name)
    if names is None:
        return {}
    sources = posed.chains[name].sources
    needed = dict.fromkeys(sources, names)
    if candidate.option.name == "rerun":
        behind = [far for source in sources if source in posed.chains for far in posed.chains[source].sources]
        needed.update(dict.fromkeys(behind, frozenset({"keep"})))
    return needed


def _allowed(row: Iterable[Candidate], names: frozenset[str], bits: int) -> frozenset[int]:
    """Places of the options of these names; of codes, those of so many bits or more."""
    return frozenset(
        place
        for place, c in enumerate(row)
        if c.option.name in names and not (c.option.name == "quantize" and (c.choice.bits or 0) < bits)
    )
