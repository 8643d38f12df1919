"""Random probes (XConv), a ladder of sizes, for what weight gradients are linear in."""

from __future__ import annotations

from collections.abc import Iterator

from xconv_fx.ops.codec import SavedAs
from xconv_fx.passes.residuals import Residual

from ..probe_ladder import probe_candidates
from ..storage import Context, Family, StorageCandidate, geometry, may_be_noisy


def offer(residual: Residual, context: Context) -> Iterator[StorageCandidate]:
    """Probes of every size, each with the parameters of least noise."""
    codecs = context.options.codecs
    if "probe" in codecs and residual.uses <= {"weight_grad", "mask"} and may_be_noisy(residual, context):
        blank = SavedAs("probe", **geometry(residual))
        for held in probe_candidates(blank, codecs.kinds, lambda held: context.noises.coded(residual, held).total):
            yield context.coded(residual, held)


FAMILY = Family(offer, rank=5)
