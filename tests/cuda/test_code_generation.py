"""Code for CUDA, generated without a GPU: all of it Triton's, but for convolutions; nothing waits for the device."""

from __future__ import annotations

import pytest
from helpers.fake_cuda import FakeCuda, wrapper
from helpers.fake_cuda.cases import CHOSEN
from helpers.fake_cuda.records import Case

# Calls that generated code may make besides its kernels.
ALLOWED = {
    "extern_kernels.convolution",
    "aten.convolution_backward",
    "xconv.seeds",
    "xconv.dense_encode",
    "xconv.dense_decode",
}


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.label)
def test_every_codec_becomes_kernels_of_triton(cuda: FakeCuda, case: Case) -> None:
    generated = cuda.generate(case)
    for half in generated.halves:
        assert wrapper.launches(half.code)
        assert not wrapper.other_kernels(half.code)
        assert not wrapper.waits(half.code)
        assert set(wrapper.fallbacks(half.code)) <= ALLOWED
        assert {value.device for value in half.takes if value.number is None} <= {"cuda:0"}
