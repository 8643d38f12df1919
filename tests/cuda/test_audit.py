"""The audit of code for CUDA against what was predicted of it, in micro-batches as well."""

from __future__ import annotations

import pytest
from helpers.fake_cuda import FakeCuda, wrapper
from helpers.fake_cuda.cases import CHOSEN
from helpers.fake_cuda.records import Case

from xconv_fx.codec_spec import CodecSpec

# By how much a step may take more than was predicted of it.
SHORT = 0.03
SLICED = Case(
    "2d-dropout", (("codecs", "quantize:4"), ("seed", 3)), CodecSpec("quantize", bits=4), slices=4, held=1
)  # fmt: skip


@pytest.mark.parametrize("case", [*CHOSEN, SLICED], ids=lambda case: case.label)
def test_predictions_are_not_short(cuda: FakeCuda, case: Case) -> None:
    generated = cuda.generate(case)
    assert max(generated.audited.values()) <= (1 + SHORT) * max(generated.predicted.values())


def test_a_step_in_micro_batches(cuda: FakeCuda) -> None:
    """Of a quarter of the batch; every slice draws seeds of its own."""
    generated = cuda.generate(SLICED)
    assert generated.plan is not None and (generated.plan.slices, generated.plan.held_slices) == (4, 1)
    assert {value.size[0] for value in generated.forward.takes if len(value.size) == 4 and value.size[2] == 32} == {2}
    assert wrapper.fallbacks(generated.forward.code)["xconv.stream_seeds"] == 1
