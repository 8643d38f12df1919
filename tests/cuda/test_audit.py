"""The audit of generated CUDA code against the plan that the code is of: both count blocks and workspaces alike."""

from __future__ import annotations

import pytest
from helpers.fake_cuda import FakeCuda, wrapper
from helpers.fake_cuda.cases import CHOSEN
from helpers.fake_cuda.records import Case

from xconv_fx.codec_spec import CodecSpec

# How far a predicted peak may be from the audited one. In fixed point a kernel of the small 3D network's backward
# writes one buffer more than the planner foresees.
CLOSE, CLOSE_FIXED = 0.03, 0.04
CASES = [case for case in CHOSEN if case.net != "128"]
SLICED = Case(
    "2d-dropout", (("codecs", "quantize:4"), ("seed", 3)), CodecSpec("quantize", bits=4), slices=4, held=1
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_peaks_are_predicted(cuda: FakeCuda, case: Case) -> None:
    generated = cuda.generate(case)
    predicted, audited = max(generated.predicted.values()), max(generated.audited.values())
    close = CLOSE_FIXED if case.force is not None and case.force.codec == "fixed" else CLOSE
    assert predicted == pytest.approx(audited, rel=close), (generated.predicted, generated.audited)


def test_a_step_in_micro_batches(cuda: FakeCuda) -> None:
    """Of a quarter of the batch; every slice draws seeds of its own, and the step takes no more than predicted."""
    generated = cuda.generate(SLICED)
    assert generated.plan is not None and (generated.plan.slices, generated.plan.held_slices) == (4, 1)
    assert {value.size[0] for value in generated.forward.takes if len(value.size) == 4 and value.size[2] == 32} == {2}
    assert wrapper.fallbacks(generated.forward.code)["xconv.stream_seeds"] == 1
    assert max(generated.audited.values()) <= (1 + CLOSE) * max(generated.predicted.values())
