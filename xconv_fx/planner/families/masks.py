"""One bit an element, for what the backward reads as a mask. Exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.passes.residuals import Residual

from ..storage import Context, Family, StorageCandidate, packed_bytes

BITS = CodecSpec("bitmask")


def offer(residual: Residual, context: Context) -> Iterator[StorageCandidate]:
    """Bits instead of the tensor, or behind it."""
    codecs = context.options.codecs
    if "bitmask" not in codecs:
        return
    if residual.uses == {"mask"}:
        count = 1 if residual.value.dtype.itemsize == 1 else len(residual.masks)
        size = count * packed_bytes(residual.forward)
        yield context.candidate(residual, BITS, size, decoded=False, traffic=residual.bytes + 2 * size)
    if residual.uses == {"mask", "weight_grad"} and not codecs.preset:
        yield from _masks_apart(residual, context)


def _masks_apart(residual: Residual, context: Context) -> Iterator[StorageCandidate]:
    """The tensor until the weight gradients are computed, and bits for the masks that are read later.

    They are read with the input gradient, which is where backwards peak.
    """
    line = context.timeline
    steps = {node: line.turn + step for step, node in enumerate(line.backward.steps)}
    readers = [steps.get(user, line.end) for user in residual.backward.users if user not in residual.masks]
    last = max(readers, default=line.end)
    if last >= line.last(residual):
        return
    masks = len(residual.masks) * packed_bytes(residual.forward)
    held = context.candidate(residual, BITS, masks, decoded=False, traffic=2 * masks)
    tensor = (line.produced(residual, kept=True), last, residual.bytes)
    option = replace(held.option, loads=(tensor, *held.option.loads))
    yield replace(held, choice=replace(held.choice, bytes_after=residual.bytes + masks), option=option)


FAMILY = Family(offer, rank=1)
