"""Few launches a layer, and nothing of the host: dense probes by a kernel of ours, shared bits by generated loops."""

from __future__ import annotations

import pytest
from helpers.fake_cuda import FakeCuda, wrapper
from helpers.fake_cuda.records import Case

from xconv_fx.codec_spec import CodecSpec

# A layer of ResNet-50, and the probes of XConv.
SIZE, PROBES = (16, 64, 56, 56), 8
PRESET = Case("2d", (("codecs", "actnn:L3"),))


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_dense_probes_launch_tens_of_kernels(cuda: FakeCuda, kind: str) -> None:
    for found in cuda.call("probes:launches", kind, SIZE, PROBES).values():
        assert found.total() <= 30, found
        assert not found["host"] and found["entries_kernel"]


@pytest.mark.parametrize("seed", [5, -1234567890123456789])
def test_the_kernel_of_probes_draws_what_plain_operations_do(cuda: FakeCuda, seed: int) -> None:
    assert cuda.interpret_call("probes:interpreted", "rademacher", seed) == (0, 0.0)
    _, largest = cuda.interpret_call("probes:interpreted", "gaussian", seed)
    assert largest < 1e-6


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_of_probes_does_not_spill(cuda: FakeCuda, capability: int) -> None:
    assert cuda.call("probes:local_memory", capability, True) == 0
    # What `cos` has for angles far from 0, which are never asked for.
    assert cuda.call("probes:local_memory", capability, False) <= 32


def test_shared_bits_are_loops_of_the_graph(cuda: FakeCuda) -> None:
    """What was noted of the samples is asked for once, whatever the number of layers."""
    code = cuda.generate(PRESET).forward.code
    called = wrapper.fallbacks(code)
    assert called["xconv.noted_gradients"] == 1
    assert set(called) <= {"extern_kernels.convolution", "xconv.seeds", "xconv.noted_gradients"}
    assert not wrapper.waits(code)
    assert wrapper.launches(code).total() <= 3 * 30


def test_what_was_noted_is_asked_for_outside_of_the_one_partition(cuda: FakeCuda) -> None:
    code = cuda.generate(Case("2d", (*PRESET.options, ("mode", "reduce-overhead")))).forward.code
    (captured,) = wrapper.partitions(code).values()
    assert "noted_gradients" not in captured and "xconv.seeds" in captured


def test_orthogonal_probes_stay_outside_of_partitions(cuda: FakeCuda) -> None:
    """They wait for eigenvalues; other kinds are captured."""
    for kind, outside in (("orthogonal", True), ("gaussian", False)):
        spec = CodecSpec("probe", kind=kind)
        options = (("codecs", f"probe:{kind}"), ("mode", "reduce-overhead"))
        for half in cuda.generate(Case("2d-small", options, spec)).halves:
            captured = "".join(wrapper.partitions(half.code).values())
            called = set(wrapper.fallbacks(half.code)) & {
                f"xconv.{name}_{what}" for name in ("dense", "orthogonal") for what in ("encode", "decode")
            }
            assert called and all((name not in captured) == outside for name in called)
