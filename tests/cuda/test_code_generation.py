"""Code for CUDA, generated without a GPU: all of it Triton's, but for convolutions; nothing waits for the device."""

from __future__ import annotations

import pytest
from helpers.fake_cuda import FakeCuda, wrapper
from helpers.fake_cuda.cases import CHOSEN
from helpers.fake_cuda.records import Case

from xconv_fx.codec_spec import CodecSpec

# Calls that generated code may make besides its kernels.
ALLOWED = {
    "extern_kernels.convolution",
    "aten.convolution_backward",
    "xconv.seeds",
    "xconv.quantize",
    "xconv.dense_encode",
    "xconv.dense_decode",
    "xconv.orthogonal_encode",
    "xconv.orthogonal_decode",
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


def test_depthwise_gradients_keep_their_kernels(cuda: FakeCuda) -> None:
    """The input gradient as a transposed convolution in as many groups as channels would leave them."""
    generated = cuda.generate(Case("2d-depthwise", (("codecs", "quantize:4"),), CodecSpec("quantize", bits=4)))
    transposed = [call for call in wrapper.convolutions(generated.backward.code) if "transposed=True" in call]
    assert not any("groups=32" in call for call in transposed), transposed
    assert "aten.convolution_backward" in wrapper.fallbacks(generated.backward.code)
