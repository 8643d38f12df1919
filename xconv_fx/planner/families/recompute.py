"""Nothing, where the backward can make the residual again of others, be they exact or in codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from xconv_fx.codec_spec import BLOCK, CodecSpec
from xconv_fx.cost_model.timing import seconds
from xconv_fx.passes.graph import arguments
from xconv_fx.passes.rematerialize import RecomputeSubgraph
from xconv_fx.passes.residuals import Residual

from ..requirement import EXACT_VALUES, Requirement, StorageKind
from ..sensitivities import EXACT, NoiseContribution
from ..storage import Context, Family, StorageCandidate, codes, packed_bytes
from .fixed_point import fixed_point

aten = torch.ops.aten

RECOMPUTE = CodecSpec("recompute")
RECOMPUTE_BLOCK = CodecSpec("recompute", kind=BLOCK)


def offer(residual: Residual, context: Context) -> Iterator[StorageCandidate]:
    """By elementwise operations, by running a convolution again, or the whole block that ends at it."""
    chain, allowed = context.chains.get(residual.name), context.options.codecs
    if chain is None:
        return
    sources = [context.residuals[name] for name in chain.sources]
    # A boolean is held in bits, for which no convolution is worth its time.
    may_rerun = "recompute" in allowed and residual.value.dtype != torch.bool
    block = context.blocks.get(residual.name)
    if may_rerun and block is not None:
        yield from _reruns(residual, block, RECOMPUTE_BLOCK, context)
    if chain.reruns:
        if may_rerun:
            yield from _reruns(residual, chain, RECOMPUTE, context)
        return
    if "recompute" in allowed:
        yield from _from_exact(residual, chain, context)
    if sources and chain.masks is not None and not any("nonlinear" in r.uses for r in (residual, *sources)):
        masks = {_bits_name(mask): mask for mask in (*residual.masks, *chain.masks)}
        if {"recompute", "quantize", "bitmask"} <= allowed.names:
            yield from _from_codes(residual, chain, sources, len(masks), context)
        yield from _from_signed_codes(residual, chain, sources, masks.values(), context)


def _from_exact(residual: Residual, chain: RecomputeSubgraph, context: Context) -> Iterator[StorageCandidate]:
    """Of exact values, which are there when it is first read, or earlier, for what is run again of it."""
    candidate = _elementwise(residual, chain, StorageKind.RECOMPUTED_ELEMENTWISE, {}, context)
    starts = context.starts[residual.name]
    if not chain.sources:  # There whenever it is wanted.
        yield replace(candidate, option=replace(candidate.option, segment=starts[0].length))
        return
    for start in starts:
        option = replace(candidate.option, segment=start.length)
        requires = tuple((name, replace(EXACT_VALUES, by=start.step)) for name in chain.sources)
        yield replace(candidate, option=option, requires=requires, start=start.step)


def _from_codes(
    residual: Residual, chain: RecomputeSubgraph, sources: Sequence[Residual], masks: int, context: Context
) -> Iterator[StorageCandidate]:
    kind = StorageKind.RECOMPUTED_FROM_CODES
    for bits in (b for b in context.options.codecs.bits if b > 1):  # One bit is too coarse.
        added = context.noises.replayed(residual, [(source, codes(source, bits, context)) for source in sources])
        requires = {source.name: _in_codes(source, bits, residual, context) for source in sources}
        yield _elementwise(residual, chain, kind, requires, context, added, masks)


def _from_signed_codes(
    residual: Residual,
    chain: RecomputeSubgraph,
    sources: Sequence[Residual],
    masks: Iterable[fx.Node],
    context: Context,
) -> Iterator[StorageCandidate]:
    # Other sources count as exact, although they may be in codes as well.
    normed = [source for source in sources if source.name in context.norms]
    norms = [context.norms[source.name] for source in normed]
    unsigned = [mask for mask in masks if all(norm.tells(mask) is None for norm in norms)]
    if not norms or (unsigned and "bitmask" not in context.options.codecs):
        return
    kind = StorageKind.RECOMPUTED_FROM_SIGNED_CODES
    for bits in context.options.codecs.fixed_bits:
        spec = fixed_point(bits)
        added = context.noises.replayed(residual, [(source, spec) for source in normed])
        requires = {source.name: _in_codes(source, bits, residual, context) for source in sources}
        requires |= {source.name: Requirement(specs=frozenset({spec})) for source in normed}
        yield _elementwise(residual, chain, kind, requires, context, added, len(unsigned))


def _in_codes(source: Residual, bits: int, residual: Residual, context: Context) -> Requirement:
    """Codes of so many bits or more, or exact values that are there when the residual is first read."""
    wide = (width for width in context.options.codecs.bits if width >= bits)
    specs = frozenset(codes(source, width, context) for width in wide)
    return Requirement(EXACT_VALUES.kinds, specs, by=context.starts[residual.name][0].step)


def _elementwise(
    residual: Residual,
    chain: RecomputeSubgraph,
    kind: StorageKind,
    requires: Mapping[str, Requirement],
    context: Context,
    added: NoiseContribution = EXACT,
    masks: int = 0,
) -> StorageCandidate:
    """The residual recomputed from others, which must be what `requires` says; `masks` is how many it needs."""
    size = chain.extra_bytes + masks * packed_bytes(residual.forward)
    candidate = context.candidate(
        residual, RECOMPUTE, size, kind=kind, decoded=True, traffic=chain.traffic, added=added
    )
    line = context.timeline
    last, sources = line.last(residual), [context.residuals[source] for source in chain.sources]
    extended = tuple((line.last(source) + 1, last, source.bytes) for source in sources if line.last(source) < last)
    option = replace(candidate.option, loads=candidate.option.loads + extended)
    return replace(candidate, option=option, requires=tuple(requires.items()))


def _reruns(
    residual: Residual, chain: RecomputeSubgraph, spec: CodecSpec, context: Context
) -> Iterator[StorageCandidate]:
    """Run its convolutions again before it is first read, or for a segment; from then on it is held like any value."""
    kind, line = StorageKind.RECOMPUTED_CONVOLUTION, context.timeline
    sources = [context.residuals[name] for name in chain.sources]
    candidate = context.candidate(residual, spec, chain.extra_bytes, kind=kind, decoded=False, traffic=0)
    time = seconds(chain.flops, chain.traffic, context.machine, str(residual.value.dtype))
    choice = replace(candidate.choice, time=time)
    for start in context.starts[residual.name]:
        step = start.step
        loads = [*candidate.option.loads, (step, line.last(residual), residual.bytes)]
        passing = sum(source.bytes for source in sources) + chain.between + chain.scratch - start.after
        loads += [(step, step, passing)] if passing > 0 else []
        loads += [(line.last(s) + 1, step, s.bytes) for s in sources if line.last(s) < step]
        option = replace(candidate.option, loads=tuple(loads), time=time, segment=start.length)
        requires = tuple((name, replace(EXACT_VALUES, by=step)) for name in chain.sources)
        yield replace(candidate, choice=choice, option=option, requires=requires, start=step)


def _bits_name(mask: fx.Node) -> str:
    """What tells apart the bits that are held: those of a ReLU are those of its backward's `relu(x) <= 0`."""
    rectified = mask.target is aten.le.Scalar and arguments(mask)[1] == 0
    return mask.all_input_nodes[0].name if rectified else mask.name


FAMILY = Family(offer, rank=2)
