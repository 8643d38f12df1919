"""Nothing, where the backward can make the residual again of others, be they exact or in codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.cost_model.timing import seconds
from xconv_fx.passes.graph import arguments
from xconv_fx.passes.rematerialize import RecomputeSubgraph
from xconv_fx.passes.residuals import Residual

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
            yield _rerun(residual, chain, sources, context)
        return
    if "recompute" in allowed:
        yield _replay(residual, chain, "recompute", context)
    if sources and chain.masks is not None and not any("nonlinear" in r.uses for r in (residual, *sources)):
        yield from _from_codes(residual, chain, sources, context)


def _from_codes(
    residual: Residual, chain: RecomputeSubgraph, sources: Sequence[Residual], context: Context
) -> Iterator[StorageCandidate]:
    allowed, noises = context.options.codecs, context.noises
    assert chain.masks is not None, "what is not affine in its sources is not made of codes"
    masks = {_bits_name(mask): mask for mask in (*residual.masks, *chain.masks)}.values()
    if {"recompute", "quantize", "bitmask"} <= allowed.names:
        for bits in (b for b in allowed.bits if b > 1):  # One bit is too coarse.
            added = noises.replayed(residual, [(source, codes(source, bits, context)) for source in sources])
            yield _replay(residual, chain, "replay", context, bits, added, len(masks))
    # Other sources count as exact, although they may be in codes as well.
    normed = [source for source in sources if source.name in context.norms]
    norms = [context.norms[source.name] for source in normed]
    unsigned = [mask for mask in masks if all(norm.tells(mask) is None for norm in norms)]
    if norms and ("bitmask" in allowed or not unsigned):
        for bits in allowed.fixed_bits:
            added = noises.replayed(residual, [(source, fixed_point(bits)) for source in normed])
            yield _replay(residual, chain, "signed", context, bits, added, len(unsigned))


def _replay(
    residual: Residual,
    chain: RecomputeSubgraph,
    name: str,
    context: Context,
    bits: int = 0,
    added: NoiseContribution = EXACT,
    masks: int = 0,
) -> StorageCandidate:
    """The residual made again from others; `name` and `bits` say from which, `masks` how many it needs."""
    size = chain.extra_bytes + masks * packed_bytes(residual.forward)
    candidate = context.candidate(residual, RECOMPUTE, size, decoded=True, traffic=chain.traffic, added=added)
    line = context.timeline
    last, sources = line.last(residual), [context.residuals[source] for source in chain.sources]
    extended = tuple((line.last(source) + 1, last, source.bytes) for source in sources if line.last(source) < last)
    # A source's own options are not known yet: `needs` is filled in by `link`, once all rows exist.
    option = replace(candidate.option, name=name, loads=candidate.option.loads + extended)
    return replace(candidate, option=option, bits=bits)


def _rerun(
    residual: Residual, chain: RecomputeSubgraph, sources: Sequence[Residual], context: Context
) -> StorageCandidate:
    """Run the convolution again before its result is first read; from then on it is held like any value."""
    candidate = context.candidate(residual, RECOMPUTE, chain.extra_bytes, decoded=False, traffic=0)
    followers = (r for name, r in context.residuals.items() if residual.name in _cheap_sources(name, context))
    line = context.timeline
    first = min(step for r in (residual, *followers) for step in line.read(r))
    loads = [*candidate.option.loads, (first, line.last(residual), residual.bytes)]
    loads += [(first, first, source.bytes) for source in sources]
    loads += [(line.last(s) + 1, first, s.bytes) for s in sources if line.last(s) < first]
    time = seconds(chain.flops, chain.traffic, context.machine, str(residual.value.dtype))
    option = replace(candidate.option, name="rerun", loads=tuple(loads), time=time)
    return replace(candidate, choice=replace(candidate.choice, time=time), option=option)


def _cheap_sources(name: str, context: Context) -> tuple[str, ...]:
    chain = context.chains.get(name)
    return () if chain is None or chain.reruns else chain.sources


def _bits_name(mask: fx.Node) -> str:
    """What tells apart the bits that are held: those of a ReLU are those of its backward's `relu(x) <= 0`."""
    rectified = mask.target is aten.le.Scalar and arguments(mask)[1] == 0
    return mask.all_input_nodes[0].name if rectified else mask.name


FAMILY = Family(offer, rank=2)
