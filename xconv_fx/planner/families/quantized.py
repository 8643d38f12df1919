"""Stochastic codes (ActNN), of the widths that are allowed."""

from __future__ import annotations

from collections.abc import Iterator

from xconv_fx.passes.residuals import Residual

from ..storage import Context, Family, StorageCandidate, codes, may_be_noisy


def offer(residual: Residual, context: Context) -> Iterator[StorageCandidate]:
    """Codes of every width."""
    if "quantize" in context.options.codecs and may_be_noisy(residual, context):
        for bits in context.options.codecs.bits:
            yield context.coded(residual, codes(residual, bits, context))


FAMILY = Family(offer, rank=4)
