"""How a tensor is held between forward and backward: the name of a codec, and the codec's parameters."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

BLOCK = "block"


@dataclass(frozen=True)
class CodecSpec:
    """A codec by its name, and those of the parameters that it has.

    `probes` are a probe codec's sums a sample, `kind` their random projections (of `options.codecs.PROBE_KINDS`), and
    `means` whether the means of channels are held exactly beside them (None: by the size of a tensor that is not known
    yet). What is recomputed from where its block begins is of the kind `BLOCK`. `bits` is the width of codes, or of
    sums (None: as they are); with `by_sample` (of `ops.codec.BY_SAMPLE`) the mean over a batch's samples.
    """

    codec: str
    _: KW_ONLY
    probes: int | None = None
    bits: int | None = None
    kind: str | None = None
    means: bool | None = False
    by_sample: str = ""
