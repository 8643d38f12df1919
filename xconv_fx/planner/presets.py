"""Published systems as presets of `codecs`: each residual is held as the system holds it, with nothing planned.

ActNN (Chen et al., ICML 2021, arXiv 2104.14129), by its levels:

* `actnn:L1`: inputs of convolutions and linear layers in 4 bits, normalisation exact;
* `actnn:L2`: all that the backward reads linearly in 4 bits, inputs of normalisation layers as well;
* `actnn:L3`: the same in 8, 4, 2 or 1 bits, 2 on average, shared out over layers by `cost_model/allocation.py`, and in
  every step over the samples of a batch by `ops/samples.py`. What can be made again from a normalisation's input may do
  without bits of its own, which are then spent on that: one copy of 4 bits has less noise than two of 2.

Codes have a range for each group of 256 and are rounded stochastically; masks are bits, offsets of max pooling int8.

XConv (arXiv 2106.06998): `xconv` holds r Gaussian projections of every convolution's input (`xconv:orthogonal`,
`xconv:independent` and `xconv:rademacher` other ones), masks as bits, and everything else as it is. r is the option
`probes`, else `codec_set.XCONV_PROBES`.

Known gaps: sensitivities of layers are the planner's, by statistics or priors; ActNN measures them while training.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from xconv_fx.cost_model.allocation import share_bits
from xconv_fx.passes.graph import numel
from xconv_fx.passes.residuals import Residual
from xconv_fx.reproducible import effort

from .problem import PlanningProblem
from .requirement import StorageKind
from .storage import StorageCandidate

AVERAGE_BITS = 2
SECONDS = 2.0


def apply_preset(planning: PlanningProblem, preset: str) -> tuple[int, ...]:
    """The place of the candidate that the preset takes, for every residual."""
    if preset == "actnn:L3":
        return _share(planning)
    wanted = {"actnn:L1": _code_inputs, "actnn:L2": _code_all}.get(preset, _probe)
    return tuple(
        max(place for place, candidate in enumerate(row) if place == 0 or wanted(residual, candidate))
        for residual, row in zip(planning.residuals, planning.candidates, strict=True)
    )


def _code_all(residual: Residual, candidate: StorageCandidate) -> bool:
    return candidate.choice.codec in ("bitmask", "quantize")


def _code_inputs(residual: Residual, candidate: StorageCandidate) -> bool:
    coded = candidate.choice.codec == "quantize" and residual.uses <= {"weight_grad", "mask"}
    return coded or candidate.choice.codec == "bitmask"


def _probe(residual: Residual, candidate: StorageCandidate) -> bool:
    return candidate.choice.codec == "bitmask" or (candidate.choice.codec == "probe" and residual.convolved)


def _share(planning: PlanningProblem) -> tuple[int, ...]:
    """Widths of least noise whose average is `AVERAGE_BITS`."""
    bits = [_bits_of_row(residual, row) for residual, row in zip(planning.residuals, planning.candidates, strict=True)]
    coded = [
        residual
        for residual, row in zip(planning.residuals, planning.candidates, strict=True)
        if any(candidate.choice.codec == "quantize" for candidate in row)
    ]
    total = AVERAGE_BITS * sum(numel(residual.forward) for residual in coded)
    return share_bits(planning.problem.items, bits, total, **effort(SECONDS))


def _bits_of_row(residual: Residual, row: Sequence[StorageCandidate]) -> list[int | None]:
    """What each candidate counts for: its codes, without ranges and masks; None where the preset does not take it."""
    codecs = [candidate.choice.codec for candidate in row]
    if "quantize" not in codecs:
        best = codecs.index("bitmask") if "bitmask" in codecs else 0
        return [0 if place == best else None for place in range(len(row))]
    return [
        (candidate.choice.bits or 0) * numel(residual.forward) if _is_of_codes(candidate) else None for candidate in row
    ]


def _is_of_codes(candidate: StorageCandidate) -> bool:
    """Whether the residual is in codes, or is recomputed from them."""
    return candidate.choice.codec == "quantize" or candidate.kind is StorageKind.RECOMPUTED_FROM_CODES


def average_bits(planning: PlanningProblem, choice: Sequence[int]) -> Fraction | None:
    """Bits an element of what is held in codes or made again from them; None when nothing is."""
    total = elements = 0
    for residual, row, place in zip(planning.residuals, planning.candidates, choice, strict=True):
        if _is_of_codes(row[place]):
            total += (row[place].choice.bits or 0) * numel(residual.forward)
            elements += numel(residual.forward)
    return Fraction(total, elements) if elements else None
