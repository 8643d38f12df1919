"""Ways to hold single residuals: what each costs, and what families of codecs offer.

A family is a module of `families/` with a function that yields the candidates which are legal for a residual; it is
found there, and added by adding the module.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil

from torch import fx

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.cost_model.device import DeviceSpec
from xconv_fx.cost_model.memory import Item, Option
from xconv_fx.cost_model.timing import seconds
from xconv_fx.ops import samples
from xconv_fx.ops.codec import codec_of, names
from xconv_fx.options import Options
from xconv_fx.passes.find_norms import Norm
from xconv_fx.passes.graph import numel
from xconv_fx.passes.rematerialize import RecomputeSubgraph
from xconv_fx.passes.residuals import Residual
from xconv_fx.plan import Choice

from .requirement import Requirement, StorageKind
from .segments import Start, starts
from .sensitivities import EXACT, NoiseContribution, Sensitivities
from .step_timeline import StepTimeline


@dataclass(frozen=True)
class StorageCandidate:
    """One way to hold one residual: a `Choice`, what it costs at which steps, and what noise it adds where.

    `requires` lists the residuals that it is recomputed from, with what they must be held as; `dependencies.py` makes
    needs of the option of that, once all candidates are known. What is run again is so at `start`, a step.
    """

    choice: Choice
    option: Option
    kind: StorageKind
    added: NoiseContribution = EXACT
    requires: tuple[tuple[str, Requirement], ...] = ()
    start: int = 0


def items_of(residuals: Iterable[Residual], rows: Iterable[tuple[StorageCandidate, ...]]) -> tuple[Item, ...]:
    """The solver's items: the residuals with the options of their candidates."""
    return tuple(
        Item(residual.name, tuple(candidate.option for candidate in row))
        for residual, row in zip(residuals, rows, strict=True)
    )


@dataclass(frozen=True)
class Context:
    """What families know besides a residual: the others, how each can be recomputed and is normalised, when all run.

    `chains` replay a residual from the nearest others, `blocks` from where its block begins.
    `apart` says that samples are known to be computed apart.
    """

    options: Options
    residuals: Mapping[str, Residual]
    timeline: StepTimeline
    chains: Mapping[str, RecomputeSubgraph]
    blocks: Mapping[str, RecomputeSubgraph]
    norms: Mapping[str, Norm]
    noises: Sensitivities
    machine: DeviceSpec
    apart: bool

    @functools.cached_property
    def starts(self) -> Mapping[str, tuple[Start, ...]]:
        """When each residual with a rerun may be run again, latest first."""
        return starts(self.residuals, self.chains, self.timeline)

    def candidate(
        self,
        residual: Residual,
        spec: CodecSpec,
        size: int,
        *,
        kind: StorageKind = StorageKind.CODED,
        decoded: bool,
        traffic: int,
        added: NoiseContribution = EXACT,
    ) -> StorageCandidate:
        """The residual held so in so many bytes, from where it is produced to where it is last read.

        With `decoded`, the tensor stands in memory wherever an extern kernel reads it. Encoding and decoding move
        `traffic` bytes.
        """
        line = self.timeline
        loads = [(line.produced(residual, kind is StorageKind.KEPT), line.last(residual), size)]
        if decoded:
            loads += [(step, step, residual.bytes) for step in line.materialised(residual)]
        time = seconds(0, traffic, self.machine) if traffic else 0.0
        dtype = str(residual.value.dtype).removeprefix("torch.")
        choice = Choice(
            residual.name, residual.layer, residual.source, residual.shape, dtype,
            tuple(sorted(residual.uses)), spec, residual.bytes, size, noise=added.noise, time=time,
            readers=residual.readers,
        )  # fmt: skip
        option = Option(spec.codec, tuple(loads), added.total, time, layers=self.noises.relative(added))
        return StorageCandidate(choice, option, kind, added)

    def coded(self, residual: Residual, spec: CodecSpec) -> StorageCandidate:
        """The residual as a codec of the table holds it, and bits for its masks, which codes would change."""
        codec, held = codec_of(spec.codec), residual.saved_as(spec)
        masks = 0 if codec.lossless else len(residual.masks) * packed_bytes(residual.forward)
        return self.candidate(
            residual,
            spec,
            codec.payload_bytes(held) + masks,
            decoded=True,
            added=EXACT if codec.lossless else self.noises.coded(residual, spec),
            traffic=codec.traffic(held) + 2 * masks,
        )


def codes(residual: Residual, bits: int, context: Context) -> CodecSpec:
    """Codes of so many bits, of the same width for all samples or, by the options, so many on average."""
    if not context.options.shares_samples or not samples.shareable(residual.shape, residual.order, bits):
        return CodecSpec("quantize", bits=bits)
    return CodecSpec("quantize", bits=bits, by_sample="apart" if context.apart else "mixed")


def may_be_noisy(residual: Residual, context: Context) -> bool:
    """Whether an approximation of it leaves gradients unbiased, and its masks, if it has any, can be held beside it."""
    masked = "mask" in residual.uses
    return not (residual.uses <= {"mask"} or "nonlinear" in residual.uses) and not (
        masked and "bitmask" not in context.options.codecs
    )


def packed_bytes(node: fx.Node) -> int:
    """Bytes of one bit for each element."""
    return 4 * ceil(numel(node) / 32)


def _countable(residual: Residual, candidate: StorageCandidate) -> bool:
    """Whether the candidate's codec, if it has one, can count what it counts of so large a tensor."""
    spec = candidate.choice.spec
    return spec.codec not in names() or codec_of(spec.codec).can_count(residual.saved_as(spec))


# Yields candidates for a residual.
Offer = Callable[[Residual, Context], Iterable[StorageCandidate]]


@dataclass(frozen=True)
class Family:
    """What a module of `families/` declares, as `FAMILY`.

    Families are asked in the order of `rank`, which is that of the candidates of a row. Where one that is `decisive`
    offers anything, nothing else is offered, but what keeps the residual under a preset.
    """

    offer: Offer
    rank: int
    decisive: bool = False


@functools.cache
def families() -> tuple[Family, ...]:
    """All families, by rank."""
    from . import families as package

    found = [
        importlib.import_module(f"{package.__name__}.{one.name}") for one in pkgutil.iter_modules(package.__path__)
    ]
    return tuple(sorted((module.FAMILY for module in found), key=lambda family: family.rank))


def candidates(residual: Residual, context: Context) -> tuple[StorageCandidate, ...]:
    """All ways to hold a residual: as it is, and what families offer."""
    keep = context.candidate(
        residual, CodecSpec("keep"), residual.bytes, kind=StorageKind.KEPT, decoded=False, traffic=0
    )
    row = [keep]
    for family in families():
        offered = list(family.offer(residual, context))
        possible = [candidate for candidate in offered if _countable(residual, candidate)]
        if family.decisive and offered:
            return (*([keep] if context.options.codecs.preset or not possible else []), *possible)
        row += possible
    return tuple(row)
