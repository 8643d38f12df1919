"""The gather of max-pooling's backward: eager against torch's own, and the generated kernel against eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import fresh_cache, run_and_get_code

from xconv_fx.ops import lowering
from xconv_fx.ops.pool import adaptive_pool_backward, adaptive_windows, max_pool_backward, overlapping_windows

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

# Input size, kernel, stride, padding.
CASES = [
    ((8,), (2,), (2,), (0,)),
    ((11,), (3,), (2,), (1,)),
    ((9,), (4,), (1,), (2,)),
    ((8, 8), (2, 2), (2, 2), (0, 0)),
    ((9, 7), (2, 2), (2, 2), (0, 0)),
    ((9, 8), (3, 3), (2, 2), (1, 1)),
    ((6, 7), (3, 3), (1, 1), (1, 1)),
    ((7, 8), (3, 2), (1, 3), (1, 0)),
    ((8, 8), (1, 1), (2, 2), (0, 0)),
    ((4, 6, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    ((5, 6, 4), (3, 3, 2), (2, 1, 2), (1, 1, 0)),
]


def window_offsets(indices, size, kernel, stride, padding):
    """torch's winners, flat indices into the input, as places inside their windows; row-major, int8."""
    offsets = torch.zeros_like(indices)
    rest, places = indices, []
    for extent in reversed(size):
        places.insert(0, rest % extent)
        rest = rest // extent
    for dim, place in enumerate(places):
        shape = [-1 if other == dim else 1 for other in range(len(size))]
        start = (torch.arange(indices.shape[2 + dim]) * stride[dim] - padding[dim]).view(shape)
        offsets = offsets * kernel[dim] + place - start
    return offsets.to(torch.int8)


def problem(case, dtype=torch.float64):
    """torch's gradient, and the operator's arguments."""
    size, kernel, stride, padding = case
    # Few distinct values: most windows have ties.
    x = torch.randint(-2, 3, (2, 3, *size)).to(dtype).requires_grad_()
    pooled, indices = POOLS[len(size)](x, kernel, stride, padding, return_indices=True)
    grad = torch.randn(pooled.shape, dtype=dtype)
    pooled.backward(grad)
    return x.grad, (grad, window_offsets(indices, size, kernel, stride, padding), size, kernel, stride, padding)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_torchs(case):
    expected, arguments = problem(case)
    torch.testing.assert_close(max_pool_backward(*arguments), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[10]], ids=str)
def test_opcheck(case):
    _, arguments = problem(case)
    torch.library.opcheck(torch.ops.xconv.max_pool_backward.default, arguments)


def test_windows_over_one_position():
    assert overlapping_windows((2, 2), (2, 2)) == 1
    assert overlapping_windows((3, 3), (2, 2)) == 4
    assert overlapping_windows((3, 3, 3), (1, 1, 1)) == 27
    assert overlapping_windows((2,), (5,)) == 1


@pytest.mark.parametrize(("dtype", "cases"), [(torch.float64, CASES[::2]), (torch.bfloat16, CASES[1:10:4])], ids=str)
def test_generated_kernels_compute_what_the_reference_does(dtype, cases):
    """Several shapes in one graph: one compilation."""
    lowering.install()
    torch._dynamo.reset()
    problems = [problem(case, dtype) for case in cases]
    fixed = [arguments[2:] for _, arguments in problems]

    def gathers(*tensors):
        pairs = zip(tensors[::2], tensors[1::2], fixed, strict=True)
        return [torch.ops.xconv.max_pool_backward(grad, offsets, *rest) for grad, offsets, rest in pairs]

    tensors = [tensor for _, arguments in problems for tensor in arguments[:2]]
    with fresh_cache():
        found, (code,) = run_and_get_code(torch.compile(gathers, backend="inductor", dynamic=False), *tensors)
    assert "torch.ops.xconv" not in code, "a lowering must have replaced the eager reference"
    for (expected, _), gathered in zip(problems, found, strict=True):
        # A kernel adds up to nine windows in float32 and rounds once; the reference rounds after each.
        tolerance = 1e-13 if dtype == torch.float64 else 0.05
        torch.testing.assert_close(gathered, expected, rtol=tolerance, atol=tolerance)


# Input size and number of windows: divisible, overlapping, all in one, more windows than positions.
ADAPTIVE = [((8, 6), (4, 3)), ((9, 7), (6, 3)), ((5, 8), (1, 1)), ((5, 4), (7, 4)), ((4, 6, 5), (2, 4, 3))]


def adaptive(case, dtype=torch.float64):
    """torch's gradient, and the operator's arguments."""
    size, windows = case
    x = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    pooled = (F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool3d)(x, windows)
    grad = torch.randn_like(pooled)
    pooled.backward(grad)
    order = [0, *range(2, 2 + len(size)), 1]
    return x.grad, (grad, list(size), order)


@pytest.mark.parametrize("case", ADAPTIVE, ids=str)
def test_adaptive_gradients_are_torchs(case):
    expected, arguments = adaptive(case)
    torch.testing.assert_close(adaptive_pool_backward(*arguments), expected, rtol=1e-13, atol=1e-13)


def test_adaptive_opcheck():
    torch.library.opcheck(torch.ops.xconv.adaptive_pool_backward.default, adaptive(ADAPTIVE[1])[1])


def test_adaptive_windows_over_one_position():
    assert [adaptive_windows(8, 4), adaptive_windows(9, 6), adaptive_windows(5, 1), adaptive_windows(5, 7)] == [
        1,
        2,
        1,
        3,
    ]


def test_generated_adaptive_gradients_are_torchs():
    """In float64, and in bfloat16, which is summed up in float32; channels-last."""
    lowering.install()
    torch._dynamo.reset()
    problems = [adaptive(case) for case in ADAPTIVE] + [adaptive(ADAPTIVE[1], torch.bfloat16)]
    fixed = [arguments[1:] for _, arguments in problems]

    def gathers(*grads):
        return [torch.ops.xconv.adaptive_pool_backward(grad, *rest) for grad, rest in zip(grads, fixed, strict=True)]

    with fresh_cache():
        call = torch.compile(gathers, backend="inductor", dynamic=False)
        found, (code,) = run_and_get_code(call, *(arguments[0] for _, arguments in problems))
    assert "torch.ops.xconv" not in code, "a lowering must have replaced the eager reference"
    for (expected, _), gathered in zip(problems, found, strict=True):
        tolerance = 1e-13 if expected.dtype == torch.float64 else 0.02
        torch.testing.assert_close(gathered, expected, rtol=tolerance, atol=tolerance)
