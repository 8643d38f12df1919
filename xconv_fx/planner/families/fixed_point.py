"""Fixed point (Chakrabarti and Moseley): codes of a normalisation's input that carry the sign of its result."""

from __future__ import annotations

from collections.abc import Iterator

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops.codec import codec_of
from xconv_fx.passes.residuals import Residual

from ..storage import Context, Family, StorageCandidate, packed_bytes


def offer(residual: Residual, context: Context) -> Iterator[StorageCandidate]:
    """Codes of every width that is allowed, and bits for the masks that they do not tell."""
    norm = context.norms.get(residual.name)
    if norm is None or "nonlinear" in residual.uses:
        return
    masks = [mask for mask in residual.masks if norm.tells(mask) is None]
    if masks and "bitmask" not in context.options.codecs:
        return
    for bits in context.options.codecs.fixed_bits:
        spec = fixed_point(bits)
        codec, held = codec_of(spec.codec), residual.saved_as(spec)
        size = codec.payload_bytes(held) + norm.table_bytes + len(masks) * packed_bytes(residual.forward)
        added = context.noises.coded(residual, spec)
        yield context.candidate(residual, spec, size, decoded=True, traffic=codec.traffic(held), added=added)


def fixed_point(bits: int) -> CodecSpec:
    """Fixed point of so many bits."""
    return CodecSpec("fixed", bits=bits)


FAMILY = Family(offer, rank=3)
