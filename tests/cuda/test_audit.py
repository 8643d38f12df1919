"""The audit of generated CUDA code against the plan that the code is of: both count blocks and workspaces alike."""

from __future__ import annotations

import re

import pytest
from helpers.fake_cuda import FakeCuda, wrapper
from helpers.fake_cuda.cases import CHOSEN, forced
from helpers.fake_cuda.records import Case

from xconv_fx.codec_spec import CodecSpec

# How far a predicted peak may be from the audited one.
CLOSE = 0.03
FIXED = CodecSpec("fixed", bits=4)
CASES = [*(case for case in CHOSEN if case.net != "128"), forced("2d", FIXED, "bfloat16")]
SLICED = Case(
    "2d-dropout", (("codecs", "quantize:4"), ("seed", 3)), CodecSpec("quantize", bits=4), slices=4, held=1
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_peaks_are_predicted(cuda: FakeCuda, case: Case) -> None:
    generated = cuda.generate(case)
    predicted, audited = max(generated.predicted.values()), max(generated.audited.values())
    assert predicted == pytest.approx(audited, rel=CLOSE), (generated.predicted, generated.audited)


def test_what_is_decoded_from_a_table_is_not_stored_in_float32(cuda: FakeCuda) -> None:
    """Of what volumes are decoded to under autocast, no kernel writes a float32: neither their own nor what is made of
    several of them."""
    generated = cuda.generate(forced("3d", FIXED, "bfloat16"))
    assert max(generated.audited.values()) <= (1 + CLOSE) * max(generated.predicted.values())
    written = re.findall(r"empty_strided_cuda\(\(2, 8, 16, 16, 16\), .*?, torch\.(\w+)\)", generated.backward.code)
    assert "bfloat16" in written and "float32" not in written, written


def test_a_step_in_micro_batches(cuda: FakeCuda) -> None:
    """Of a quarter of the batch; every slice draws seeds of its own, and the step takes no more than predicted."""
    generated = cuda.generate(SLICED)
    assert generated.plan is not None and (generated.plan.slices, generated.plan.held_slices) == (4, 1)
    assert {value.size[0] for value in generated.forward.takes if len(value.size) == 4 and value.size[2] == 32} == {2}
    assert wrapper.fallbacks(generated.forward.code)["xconv.stream_seeds"] == 1
    assert max(generated.audited.values()) <= (1 + CLOSE) * max(generated.predicted.values())
