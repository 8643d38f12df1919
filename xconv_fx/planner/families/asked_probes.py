"""As many probes as the user, or the preset `xconv`, asks for: nothing is left to choose."""

from __future__ import annotations

from collections.abc import Iterator

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops.fold import fitted
from xconv_fx.options.codecs import XCONV_PROBES
from xconv_fx.passes.residuals import Residual

from ..storage import Context, Family, StorageCandidate


def offer(residual: Residual, context: Context) -> Iterator[StorageCandidate]:
    """So many probes, of the first kind that is allowed."""
    asked = _asked(residual, context)
    if asked is not None and residual.uses <= {"weight_grad", "mask"}:
        kinds = context.options.codecs.kinds
        kind = "fold" if "fold" in kinds or not kinds else kinds[0]
        probes, means = fitted(residual.shape, asked, kind)
        yield context.coded(residual, CodecSpec("probe", probes=probes, kind=kind, means=means))


def _asked(residual: Residual, context: Context) -> int | None:
    """How many probes must be held of a residual: what the user says, or the preset `xconv` of convolutions."""
    if "weight_grad" not in residual.uses:
        return None
    count = context.options.probes.count_among(residual.readers)
    if not context.options.codecs.preset.startswith("xconv"):
        return count
    return (count or XCONV_PROBES) if residual.convolved else None


FAMILY = Family(offer, rank=0, decisive=True)
