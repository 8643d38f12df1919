"""Generated kernels against the eager reference, and the shape of the generated code (C++, so on CPU)."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

from xconv_fx.ops import fitting_probes, layout, lowering

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

SEED = torch.tensor([-6123456789012345678])
IMAGE = (4, 64, 16, 16)
CHANNELS_LAST = [0, 2, 3, 1]
ops = torch.ops.xconv

# Size, order, type, bits, fold: odd sizes, groups and words with padding, dimensions of extent 1, a prime row.
CASES = [
    ((2, 72, 9, 5), [0, 2, 3, 1], torch.float32, 2, 3),
    ((2, 40, 7, 7), [0, 2, 3, 1], torch.bfloat16, 4, 20),
    ((2, 3, 4, 5, 6), [0, 1, 2, 3, 4], torch.float64, 4, 4),
    ((3, 8, 50), [0, 1, 2], torch.float16, 8, 2),
    ((3, 70, 33), [0, 1, 2], torch.bfloat16, 1, 9),
    ((4, 1009), [0, 1], torch.float32, 16, 7),
    ((1, 1, 3, 5), [0, 2, 3, 1], torch.float32, 1, 1),
]


@pytest.fixture(autouse=True)
def generated():
    """Lowerings installed, nothing cached: caches are not keyed by the source of a lowering."""
    lowering.install()
    torch._dynamo.reset()
    with fresh_cache():
        yield


def tensor(size, order, dtype=torch.float32):
    return layout.to_logical(torch.randn(layout.physical_size(size, order), dtype=torch.float64).to(dtype), order)


def compiled(function, *inputs):
    """The outputs of the compiled `function`, and the text of its only graph."""
    outputs, (code,) = run_and_get_code(torch.compile(function, backend="inductor", dynamic=False), *inputs)
    return outputs, code


def allocations(code: str) -> list[tuple[int, str]]:
    """Elements and type of every buffer that the generated code allocates."""
    found = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\), \([\d, ]+\), torch\.(\w+)\)", code)
    return [(math.prod(int(extent) for extent in size.split(",") if extent.strip()), dtype) for size, dtype in found]


def vectorised(code: str) -> bool:
    return "Vectorized<" in code


@pytest.mark.parametrize(("size", "order", "dtype", "bits", "fold"), CASES, ids=str)
def test_kernels_compute_what_the_reference_does(size, order, dtype, bits, fold):
    probes = fitting_probes(size, order, -(-math.prod(size[1:]) // fold))

    def every_operator(x, seed):
        words = ops.pack_mask(x > 0, order)
        codes, ranges = ops.quantize(x, seed, bits, order)
        sums = ops.fold(x, seed, probes, order)
        return (
            words,
            ops.unpack_mask(words, size, order),
            codes,
            ranges,
            ops.dequantize(codes, ranges, size, order, bits, dtype),
            sums,
            ops.unfold(sums, seed, size, order, dtype),
        )

    x = tensor(size, order, dtype)
    outputs, code = compiled(every_operator, x, SEED)
    names = ("words", "mask", "codes", "ranges", "dequantized", "sums", "unfolded")
    for name, output, expected in zip(names, outputs, every_operator(x, SEED), strict=True):
        assert output.dtype == expected.dtype and output.stride() == expected.stride(), name
        if name in ("sums", "unfolded"):
            # Sums of several terms are added up in another order.
            torch.testing.assert_close(output, expected, msg=name)
        else:
            assert torch.equal(output, expected), name
    assert "torch.ops.xconv" not in code


def test_inputs_in_another_layout_are_read_in_the_order_asked_for():
    x = torch.randn(2, 64, 4, 8)

    def encode(x, seed):
        return ops.pack_mask(x > 0, CHANNELS_LAST), *ops.quantize(x, seed, 4, CHANNELS_LAST)

    outputs, _ = compiled(encode, x, SEED)
    for output, expected in zip(outputs, encode(x, SEED), strict=True):
        assert torch.equal(output, expected)


def test_masked_gradient_is_one_vectorised_kernel_without_a_boolean():
    gradient = tensor(IMAGE, CHANNELS_LAST)
    words = ops.pack_mask(tensor(IMAGE, CHANNELS_LAST) <= 0, CHANNELS_LAST)

    def backward(words, gradient):
        return torch.where(ops.unpack_mask(words, IMAGE, CHANNELS_LAST), 0.0, gradient)

    output, code = compiled(backward, words, gradient)
    assert torch.equal(output, backward(words, gradient)) and output.stride() == gradient.stride()
    assert code.count("cpp_pybinding(") == 1 and code.count("#pragma omp for") <= 1
    assert allocations(code) == [(gradient.numel(), "float32")]
    assert vectorised(code)


def test_a_decoded_tensor_is_inlined_into_its_reader():
    x = tensor(IMAGE, CHANNELS_LAST)
    codes, ranges = ops.quantize(x, SEED, 4, CHANNELS_LAST)

    def normalised(codes, ranges, gradient, mean):
        return (ops.dequantize(codes, ranges, IMAGE, CHANNELS_LAST, 4, torch.float32) - mean) * gradient

    inputs = (codes, ranges, x, torch.randn(1, 64, 1, 1))
    output, code = compiled(normalised, *inputs)
    assert torch.equal(output, normalised(*inputs))
    assert allocations(code) == [(x.numel(), "float32")]
    assert vectorised(code)


def test_encoders_read_the_activation_and_allocate_payloads_only():
    # The second convolution makes Inductor store the activation; every encoder must read that buffer.
    weight = torch.randn(16, 16, 3, 3)
    probes = fitting_probes((2, 16, 16, 16), CHANNELS_LAST, 256)

    def forward(x, weight, seed):
        y = torch.relu(torch.nn.functional.conv2d(x, weight, padding=1))
        words = ops.pack_mask(y <= 0, CHANNELS_LAST)
        codes, ranges = ops.quantize(y, seed, 4, CHANNELS_LAST)
        mean = y.mean((2, 3), keepdim=True)
        sums = ops.fold(y - mean, seed, probes, CHANNELS_LAST)
        return torch.nn.functional.conv2d(y, weight, padding=1), words, codes, ranges, mean, sums

    x = tensor((2, 16, 16, 16), CHANNELS_LAST)
    with torch.no_grad():
        outputs, code = compiled(forward, x, weight, SEED)
        y = torch.relu(torch.nn.functional.conv2d(x, weight, padding=1))
    # The mask and the codes of the activation the compiled program has: convolutions may round otherwise.
    assert torch.equal(ops.unpack_mask(outputs[1], y.shape, CHANNELS_LAST), y <= 0)
    decoded = ops.dequantize(outputs[2], outputs[3], y.shape, CHANNELS_LAST, 4, torch.float32)
    assert (decoded - y).abs().max() <= (outputs[3][1] - outputs[3][0]).max() / 15 + 1e-4
    unfolded = ops.unfold(outputs[5], SEED, y.shape, CHANNELS_LAST, torch.float32)
    expected = ops.fold(y - outputs[4], SEED, probes, CHANNELS_LAST)
    torch.testing.assert_close(outputs[5], expected, rtol=1e-3, atol=1e-3)
    assert unfolded.shape == y.shape
    assert all(size < y.numel() for size, _ in allocations(code))
    assert vectorised(code)


def test_installing_twice_changes_nothing():
    before = lowering.lowerings[torch.ops.xconv.fold.default]
    lowering.install()
    assert lowering.lowerings[torch.ops.xconv.fold.default] is before
