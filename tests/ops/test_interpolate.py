"""The gather of interpolation's backward: eager against torch's own, and the generated kernel against that."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import fresh_cache, run_and_get_code

from xconv_fx.ops import lowering
from xconv_fx.ops.interpolate import MOST_SINGLE_TERMS, axes, gathers, interpolate_backward, rounds

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

# torch's mode, the operator's, and numbers of spatial dims.
MODES = [
    ("nearest", "nearest", (1, 2, 3)),
    ("nearest-exact", "nearest-exact", (1, 2, 3)),
    ("linear", "linear", (1,)),
    ("bilinear", "linear", (2,)),
    ("trilinear", "linear", (3,)),
    ("bicubic", "cubic", (2,)),
]
SIZES = [
    {"scale_factor": 2},
    {"scale_factor": 3},
    {"scale_factor": 2.5},
    {"scale_factor": 0.4},
    {"scale_factor": 1.7, "recompute_scale_factor": True},
    {"scale_factor": 1.7, "recompute_scale_factor": False},
    {"size": (11, 4, 9)},
    {"size": (1, 1, 1)},
]
CASES = [
    (dims, mode, ours, corners, size)
    for mode, ours, ranks in MODES
    for dims in ranks
    for corners in ([None] if mode.startswith("nearest") else [False, True])
    for size in SIZES
]
INPUT = (7, 6, 5)
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def problem(case, dtype=torch.float64, last=False):
    """torch's gradient, and the operator's arguments; bfloat16's are reckoned in float32."""
    dims, mode, ours, corners, given = case
    given = {**given, "size": given["size"][:dims]} if "size" in given else given
    x = torch.randn(2, 3, *INPUT[:dims], dtype=torch.float32 if dtype == torch.bfloat16 else dtype, requires_grad=True)
    y = F.interpolate(x, mode=mode, align_corners=corners, **given)
    grad = torch.randn_like(y).to(dtype)
    if last:
        grad = grad.contiguous(memory_format=FORMATS[dims])
    (expected,) = torch.autograd.grad(y, x, grad.to(y.dtype))
    scale = 0.0 if given.get("recompute_scale_factor") else float(given.get("scale_factor", 0.0))
    return expected, (grad, list(INPUT[:dims]), ours, bool(corners), [scale] * dims)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_gradients_are_torchs(dtype, tolerance):
    for expected, arguments in (problem(case, dtype) for case in CASES):
        torch.testing.assert_close(interpolate_backward(*arguments), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", [CASES[0], CASES[10], CASES[-1]], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_opcheck(case, last):
    _, arguments = problem(case, last=last and case[0] > 1)
    torch.library.opcheck(torch.ops.xconv.interpolate_backward.default, arguments)


def generated(problems):
    """What generated kernels make of several problems in one graph."""
    lowering.install()
    torch._dynamo.reset()
    fixed = [arguments[1:] for _, arguments in problems]

    def gather(*grads):
        return [torch.ops.xconv.interpolate_backward(grad, *rest) for grad, rest in zip(grads, fixed, strict=True)]

    with fresh_cache():
        call = torch.compile(gather, backend="inductor", dynamic=False)
        found, (code,) = run_and_get_code(call, *(arguments[0] for _, arguments in problems))
    assert "torch.ops.xconv" not in code, "a lowering must have replaced the eager reference"
    return found


# Every mode, both ways to align, each way to say a size; some in several kernels.
KERNELS = [CASES[place] for place in range(0, len(CASES), 11)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("last", [False, True])
def test_generated_kernels_compute_the_same(dtype, tolerance, last):
    problems = [problem(case, dtype, last) for case in KERNELS if case[0] > 1 or not last]
    for (expected, (grad, *_)), found in zip(problems, generated(problems), strict=True):
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)
        if last:
            assert found.is_contiguous(memory_format=FORMATS[grad.dim() - 2])


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
def test_generated_kernels_of_all_cases(last):
    problems = [problem(case, torch.float64, last) for case in CASES if case[0] > 1 or not last]
    for (expected, _), found in zip(problems, generated(problems), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_infinite_stays_where_it_is():
    """Nearest interpolation by a fraction weighs readers by 0 or 1, and infinity by neither."""
    grad = torch.zeros(1, 1, 10)
    grad[..., 4] = torch.inf
    expected = torch.zeros(1, 1, 4)
    expected[..., 1] = torch.inf
    arguments = grad, [4], "nearest", False, [2.5]
    assert torch.equal(generated([(expected, arguments)])[0], expected)


def along(mode, scale, dims=3, corners=False, extent=40):
    """The axes of a volume that is interpolated by a whole factor."""
    return axes([extent * scale] * dims, [extent] * dims, mode, corners, [float(scale)] * dims, torch.float32)


def test_few_positions_read_one():
    def taps(mode, scale, corners=False):
        return along(mode, scale, 1, corners)[0].window.taps

    assert [taps("nearest", 2), taps("nearest-exact", 3)] == [2, 3]
    assert [taps("linear", 2), taps("linear", 3), taps("cubic", 2)] == [4, 5, 8]
    assert all(axis.window.whole for axis in along("nearest", 2))
    assert not any(axis.window.whole for axis in along("linear", 2))
    assert taps("linear", 2, corners=True) <= 5
    assert not gathers(axes([1 << 25], [1 << 24], "nearest", False, [2.0], torch.float32))


def test_every_reader_is_in_the_window():
    sizes = itertools.product((1, 2, 3, 7, 10, 16), (1, 2, 5, 9, 16, 31))
    for (extent, outputs), mode, corners in itertools.product(
        sizes, ("nearest", "nearest-exact", "linear", "cubic"), (False, True)
    ):
        (axis,) = axes([outputs], [extent], mode, corners, [0.0], torch.float32)
        read, weights = axis.reads(torch.device("cpu"))
        for row, weight in zip(read.tolist(), weights.tolist(), strict=True):
            for reader, (position, share) in enumerate(zip(row, weight, strict=True)):
                first = axis.window.first(position)
                assert not share or first <= reader < first + axis.window.taps


def test_axes_are_gathered_together_where_terms_are_few():
    assert rounds(along("nearest", 2), MOST_SINGLE_TERMS) == [[0, 1, 2]]
    assert rounds(along("linear", 2)) == [[0, 1, 2]]
    assert rounds(along("linear", 2), MOST_SINGLE_TERMS) == [[0], [1], [2]]
    first_large = axes([20, 80], [40, 40], "linear", False, [0.0, 0.0], torch.float32)
    assert rounds(first_large, 1) == [[1], [0]]
