"""Nothing, where the backward can make the residual again of others, be they exact or in codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.cost_model.timing import seconds
from xconv_fx.passes.graph import arguments
from xconv_fx.passes.rematerialize import RecomputeSubgraph
from xconv_fx.passes.residuals import Residual

from ..requirement import EXACT_VALUES, HELD, KEPT, NEAR, Requirement, StorageKind
from ..sensitivities import EXACT, NoiseContribution
from ..storage import Context, Family, StorageCandidate, codes, packed_bytes
from .fixed_point import fixed_point

aten = torch.ops.aten

RECOMPUTE = CodecSpec("recompute")


def offer(residual: Residual, context: Context) -> Iterator[StorageCandidate]:
    """By elementwise operations, or by running a convolution again."""
    chain, allowed = context.chains.get(residual.name), context.options.codecs
    if chain is None:
        return
    sources = [context.residuals[name] for name in chain.sources]
    if chain.reruns:
        if "recompute" in allowed:
            yield from _convolutions(residual, chain, sources, context)
        return
    if "recompute" in allowed:
        requires = dict.fromkeys(chain.sources, EXACT_VALUES)
        yield _elementwise(residual, chain, StorageKind.RECOMPUTED_ELEMENTWISE, requires, context)
    if sources and chain.masks is not None and not any("nonlinear" in r.uses for r in (residual, *sources)):
        masks = {_bits_name(mask): mask for mask in (*residual.masks, *chain.masks)}
        if {"recompute", "quantize", "bitmask"} <= allowed.names:
            yield from _from_codes(residual, chain, sources, len(masks), context)
        yield from _from_signed_codes(residual, chain, sources, masks.values(), context)


def _from_codes(
    residual: Residual, chain: RecomputeSubgraph, sources: Sequence[Residual], masks: int, context: Context
) -> Iterator[StorageCandidate]:
    kind = StorageKind.RECOMPUTED_FROM_CODES
    for bits in (b for b in context.options.codecs.bits if b > 1):  # One bit is too coarse.
        added = context.noises.replayed(residual, [(source, codes(source, bits, context)) for source in sources])
        requires = {source.name: _in_codes(source, bits, context) for source in sources}
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
        requires = {source.name: _in_codes(source, bits, context) for source in sources}
        requires |= {source.name: Requirement(specs=frozenset({spec})) for source in normed}
        yield _elementwise(residual, chain, kind, requires, context, added, len(unsigned))


def _in_codes(source: Residual, bits: int, context: Context) -> Requirement:
    """Exact values, or codes of so many bits or more."""
    wide = (width for width in context.options.codecs.bits if width >= bits)
    return Requirement(EXACT_VALUES.kinds, frozenset(codes(source, width, context) for width in wide))


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


def _convolutions(
    residual: Residual, chain: RecomputeSubgraph, sources: Sequence[Residual], context: Context
) -> Iterator[StorageCandidate]:
    """Run the convolution again before its result is first read.

    That is by itself or by what is replayed from it. What is replayed from that in turn may be read earlier: then there
    is a candidate that requires these others to be held, and one whose result is there in time for them.
    """
    line = context.timeline
    followers = context.followers[residual.name]
    first = min(step for name in (residual.name, *followers) for step in line.read(context.residuals[name]))
    behind = dict.fromkeys(far for name in followers for far in context.followers[name])
    earliest = {name: _earliest(name, context) for name in behind}
    early = {name: HELD for name, step in earliest.items() if step < first}
    yield _convolution(residual, chain, sources, context, first, early)
    if early:
        yield _convolution(residual, chain, sources, context, min(earliest.values()), {})


def _convolution(
    residual: Residual,
    chain: RecomputeSubgraph,
    sources: Sequence[Residual],
    context: Context,
    first: int,
    required: Mapping[str, Requirement],
) -> StorageCandidate:
    """Run the convolution again before step `first`; from then on its result is held like any value."""
    kind, line = StorageKind.RECOMPUTED_CONVOLUTION, context.timeline
    candidate = context.candidate(residual, RECOMPUTE, chain.extra_bytes, kind=kind, decoded=False, traffic=0)
    loads = [*candidate.option.loads, (first, line.last(residual), residual.bytes)]
    loads += [(first, first, source.bytes) for source in sources]
    loads += [(line.last(s) + 1, first, s.bytes) for s in sources if line.last(s) < first]
    time = seconds(chain.flops, chain.traffic, context.machine, str(residual.value.dtype))
    option = replace(candidate.option, loads=tuple(loads), time=time)
    requires = tuple({**_few_steps_away(chain, context), **required}.items())
    return replace(candidate, choice=replace(candidate.choice, time=time), option=option, requires=requires)


def _few_steps_away(chain: RecomputeSubgraph, context: Context) -> dict[str, Requirement]:
    """What a convolution that is run again requires: its sources near, and kept what these are recomputed from."""
    behind = [far for name in chain.sources if name in context.chains for far in context.chains[name].sources]
    return {**dict.fromkeys(chain.sources, NEAR), **dict.fromkeys(behind, KEPT)}


def _earliest(name: str, context: Context) -> int:
    """The first step that reads the residual, or what can be replayed from it, one from the other."""
    steps, stack, seen = [], [name], {name}
    while stack:
        current = stack.pop()
        steps += context.timeline.read(context.residuals[current])
        following = [other for other in context.followers[current] if other not in seen]
        seen.update(following)
        stack += following
    return min(steps)


def _bits_name(mask: fx.Node) -> str:
    """What tells apart the bits that are held: those of a ReLU are those of its backward's `relu(x) <= 0`."""
    rectified = mask.target is aten.le.Scalar and arguments(mask)[1] == 0
    return mask.all_input_nodes[0].name if rectified else mask.name


FAMILY = Family(offer, rank=2)
