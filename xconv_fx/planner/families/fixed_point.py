"""Fixed point (Chakrabarti and Moseley): codes of a normalisation's input that carry the sign of its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from xconv_fx.ops.codec import SavedAs, codec_of
from xconv_fx.passes.residuals import Residual

from ..storage import Context, Family, StorageCandidate, geometry, packed_bytes


def offer(residual: Residual, context: Context) -> Iterator[StorageCandidate]:
    """Codes of every width that is allowed, and bits for the masks that they do not tell."""
    norm = context.norms.get(residual.name)
    if norm is None or "nonlinear" in residual.uses:
        return
    masks = [mask for mask in residual.masks if norm.tells(mask) is None]
    if masks and "bitmask" not in context.options.codecs:
        return
    for bits in context.options.codecs.fixed_bits:
        held = fixed_point(residual, bits)
        codec = codec_of(held.codec)
        size = codec.payload_bytes(held) + norm.table_bytes + len(masks) * packed_bytes(residual.forward)
        added = context.noises.coded(residual, held)
        candidate = context.candidate(residual, "fixed", size, decoded=True, traffic=codec.traffic(held), added=added)
        yield replace(candidate, choice=replace(candidate.choice, bits=bits))


def fixed_point(residual: Residual, bits: int) -> SavedAs:
    """Fixed point of so many bits."""
    return SavedAs("fixed", **geometry(residual), bits=bits)


FAMILY = Family(offer, rank=3)
