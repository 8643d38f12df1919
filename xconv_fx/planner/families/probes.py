"""Random probes (XConv), a ladder of sizes, for what weight gradients are linear in."""

from __future__ import annotations

from collections.abc import Iterator

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.passes.residuals import Residual

from ..probe_ladder import probe_candidates
from ..storage import Context, Family, StorageCandidate, may_be_noisy


def offer(residual: Residual, context: Context) -> Iterator[StorageCandidate]:
    """Probes of every size, each with the parameters of least noise."""
    codecs = context.options.codecs
    if "probe" in codecs and residual.uses <= {"weight_grad", "mask"} and may_be_noisy(residual, context):
        blank = residual.saved_as(CodecSpec("probe"))
        for held in probe_candidates(blank, codecs.kinds, lambda held: context.noises.coded(residual, held.spec).total):
            yield context.coded(residual, held.spec)


FAMILY = Family(offer, rank=5)
