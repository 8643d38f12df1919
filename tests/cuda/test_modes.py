"""The modes of `torch.compile` on CUDA: partitions that a CUDA graph captures, kernels that are timed."""

from __future__ import annotations

import pytest
from helpers.fake_cuda import FakeCuda, wrapper
from helpers.fake_cuda.records import Case

from xconv_fx.codec_spec import CodecSpec

QUANTIZE = CodecSpec("quantize", bits=4)


def in_mode(mode: str, **options: object) -> Case:
    return Case("2d", (("codecs", "quantize:4"), ("mode", mode), *options.items()), QUANTIZE)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_cuda_graph_captures_each_half_whole(cuda: FakeCuda, mode: str) -> None:
    """Seeds of torch's generator of the device included, which every replay draws anew."""
    generated = cuda.generate(in_mode(mode))
    for half in generated.halves:
        assert list(wrapper.partitions(half.code)) == ["partition_0"]
    assert "xconv.seeds" in wrapper.partitions(generated.forward.code)["partition_0"]


def test_timed_kernels_without_cuda_graphs(cuda: FakeCuda) -> None:
    generated = cuda.generate(in_mode("max-autotune-no-cudagraphs"))
    assert all(wrapper.launches(half.code) and not wrapper.partitions(half.code) for half in generated.halves)


def test_seeds_of_a_stream_are_drawn_outside(cuda: FakeCuda) -> None:
    """They come from the host: captured, they would be the same in every step. The rest is one partition."""
    generated = cuda.generate(in_mode("reduce-overhead", seed=3))
    (captured,) = wrapper.partitions(generated.forward.code).values()
    assert "stream_seeds" not in captured
    assert wrapper.fallbacks(generated.forward.code)["xconv.stream_seeds"] == 1
    assert len(wrapper.partitions(generated.backward.code)) == 1
