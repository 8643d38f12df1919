"""Bytes inside extern kernels against what the allocator saw."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from xconv_fx.device import workspace
from xconv_fx.device.workspace import node_workspace, workspace_bytes
from xconv_fx.hooks import dispatch
from xconv_fx.measure import allocated_by, physical_peak, storage_bytes

aten = torch.ops.aten
CONVOLUTION, BACKWARD = aten.convolution.default, aten.convolution_backward.default


def arguments(x_size, weight_size, dtype=torch.float32, padding=1, dilation=1, stride=1):
    x, weight = torch.randn(x_size, dtype=dtype), torch.randn(weight_size, dtype=dtype)
    rank = len(x_size) - 2
    geometry = ([stride] * rank, [padding] * rank, [dilation] * rank, False, [0] * rank, 1)
    return x, weight, geometry


def transient(function):
    """What the allocator held at most during a call, beyond what the call returned."""
    peak, returned = allocated_by(function)
    return peak - storage_bytes(returned)


# float64 and dilation take ATen's native convolutions, which unfold their input; oneDNN takes the rest.
NATIVE = {
    "2d": arguments((2, 4, 12, 10), (6, 4, 3, 3), torch.float64),
    "2d, strided": arguments((2, 4, 12, 10), (6, 4, 3, 3), torch.float64, stride=2),
    "2d, dilated": arguments((2, 4, 12, 10), (6, 4, 3, 3), torch.float64, dilation=2),
    "3d": arguments((2, 4, 8, 6, 7), (6, 4, 3, 3, 3), torch.float64),
    "3d, dilated": arguments((2, 4, 8, 6, 7), (6, 4, 3, 3, 3), torch.float64, dilation=2),
}


@pytest.mark.parametrize("case", NATIVE)
def test_native_convolutions(case):
    x, weight, geometry = NATIVE[case]
    foreseen = workspace_bytes(CONVOLUTION, (x, weight, None, *geometry))
    assert foreseen > x.nbytes
    assert transient(lambda: CONVOLUTION(x, weight, None, *geometry)) == pytest.approx(foreseen, rel=0.05)


@pytest.mark.parametrize("case", NATIVE)
def test_weight_gradients_of_native_convolutions(case):
    x, weight, geometry = NATIVE[case]
    grad = torch.randn_like(CONVOLUTION(x, weight, None, *geometry))
    call = (grad, x, weight, None, *geometry, [False, True, False])
    foreseen = workspace_bytes(BACKWARD, call)
    assert transient(lambda: BACKWARD(*call)) == pytest.approx(foreseen, rel=0.15)


@pytest.mark.parametrize("batch", [2, 24])
@pytest.mark.parametrize(("before", "after", "stride"), [(24, 24, 1), (16, 32, 2)])
def test_weight_gradients_of_16_bit_images(batch, before, after, stride):
    """oneDNN's scratch in float32 by threads; ATen's unfolded images on processors for which it has no kernels."""
    x, weight, geometry = arguments((batch, before, 24, 24), (after, before, 3, 3), torch.bfloat16, stride=stride)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    grad = torch.randn_like(CONVOLUTION(x, weight, None, *geometry))
    call = (grad, x, weight, None, *geometry, [False, True, False])
    foreseen = workspace_bytes(BACKWARD, call)
    assert foreseen > weight.nbytes
    assert transient(lambda: BACKWARD(*call)) == pytest.approx(foreseen, rel=0.05)


def test_library_convolutions_take_little():
    x, weight, geometry = arguments((2, 16, 32, 32), (16, 16, 3, 3))
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    foreseen = workspace_bytes(CONVOLUTION, (x, weight, None, *geometry))
    # Reordered weights and a scratchpad, small beside what unfolding would take.
    assert foreseen == transient(lambda: CONVOLUTION(x, weight, None, *geometry))
    assert weight.nbytes <= foreseen < x.nbytes / 2


def test_pointwise_native_convolutions_unfold_nothing():
    x, weight, geometry = arguments((2, 4, 12, 10), (6, 4, 1, 1), torch.float64, padding=0)
    assert workspace_bytes(CONVOLUTION, (x, weight, None, *geometry)) == 0
    assert transient(lambda: CONVOLUTION(x, weight, None, *geometry)) <= weight.nbytes


def test_what_is_not_counted():
    x = torch.randn(4, 4)
    assert workspace_bytes(aten.view.default, (x, [16])) == 0
    assert workspace_bytes(aten.empty.memory_format, ([16],)) == 0
    x, weight, geometry = arguments((1, 2, 8, 8), (2, 2, 3, 3), torch.float64)
    assert workspace_bytes(CONVOLUTION, (x.to("meta"), weight.to("meta"), None, *geometry)) == 0


def test_nodes_have_the_workspace_of_their_fake_tensors():
    x, weight, geometry = NATIVE["3d"]
    graph = fx.Graph()
    inputs = [graph.placeholder("x"), graph.placeholder("w")]
    inputs[0].meta["val"], inputs[1].meta["val"] = x, weight
    node = graph.call_function(CONVOLUTION, (*inputs, None, *geometry))
    assert node_workspace(node) == workspace_bytes(CONVOLUTION, (x, weight, None, *geometry))
    assert node_workspace(graph.call_function(aten.relu.default, (node,))) == 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("last", [True, False])
def test_deep_volumes_are_measured_on_shallow_ones(batch, last, monkeypatch):
    """Convolutions, their input gradients, and weight gradients in slabs, against calls at full size."""
    from xconv_fx.ops import conv3d

    form = torch.channels_last_3d if last else torch.contiguous_format
    x = torch.randn(batch, 16, 96, 64, 8).contiguous(memory_format=form)
    weight = torch.randn(8, 16, 3, 3, 3).contiguous(memory_format=form)
    geometry = ([1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1)
    depths = []
    full = workspace.measured

    def watched(func, args, kwargs):
        depths.append(args[0].size[2])
        return full(func, args, kwargs)

    monkeypatch.setattr(workspace, "measured", watched)
    monkeypatch.setattr(workspace, "WORK_OF_FEW", 1e8)
    workspace._found.cache_clear()
    call = (x, weight, None, *geometry)
    near = {"rel": 0.1, "abs": weight.nbytes}
    assert workspace_bytes(CONVOLUTION, call) == pytest.approx(transient(lambda: CONVOLUTION(*call)), **near)
    grad = torch.randn(batch, 8, 96, 64, 8).contiguous(memory_format=form)
    call = (grad, weight, None, *geometry[:3], True, [0] * 3, 1)
    assert workspace_bytes(CONVOLUTION, call) == pytest.approx(transient(lambda: CONVOLUTION(*call)), **near)
    whole = (grad, x, weight, None, *geometry, [False, True, False])
    slabs = torch.ops.xconv.volume_weight_gradient.default  # Also where, by the processor, oneDNN is left to it.
    call = conv3d.arguments_for(slabs, whole, whole)
    assert workspace_bytes(slabs, call) == pytest.approx(transient(lambda: slabs(*call)), **near)
    assert max(depths) < 96


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_depthwise_and_contiguous_images(form):
    x = torch.randn(2, 64, 20, 20).contiguous(memory_format=form)
    weight = torch.randn(64, 1, 7, 7)
    grad = torch.randn_like(x)
    geometry = ([1, 1], [3, 3], [1, 1], False, [0, 0], 64)
    call = (x, weight, None, *geometry)
    assert workspace_bytes(CONVOLUTION, call) == transient(lambda: CONVOLUTION(*call))
    call = (grad, x, weight, None, *geometry, [False, True, False])
    found = workspace_bytes(BACKWARD, call)
    assert found == transient(lambda: BACKWARD(*call))
    if form is torch.channels_last:
        assert found > 32 * weight.nbytes, "padded to the processor's vectors"


@pytest.mark.parametrize("depth", [12, 48])
def test_a_part_of_the_channels_is_copied(depth):
    """A gradient that is part of a concatenation's: oneDNN wants it in memory of its own."""
    whole = torch.randn(2, 32, depth, 24, 24).contiguous(memory_format=torch.channels_last_3d)
    x, weight = whole[:, :16], torch.randn(8, 16, 3, 3, 3)
    call = (x, weight, None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1)
    found = workspace_bytes(CONVOLUTION, call)
    assert found > x.numel() * 4
    assert found == pytest.approx(transient(lambda: CONVOLUTION(*call)), rel=0.02)


def image(*size, last=True):
    return torch.randn(*size).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def narrow(before, after, transposed=False):
    """A convolution of few channels, which oneDNN pads, with a contiguous weight, which it reorders twice."""
    weight = torch.randn(*((before, after) if transposed else (after, before)), 3, 3)
    return CONVOLUTION, (image(2, before, 16, 16), weight, None, [1, 1], [1, 1], [1, 1], transposed, [0, 0], 1)


def line_gradient(before, after, kernel, length):
    """The weight gradient of a 1D convolution."""
    x, grad, weight = torch.randn(1, before, length), torch.randn(1, after, length), torch.randn(after, before, kernel)
    geometry = ([1], [kernel // 2], [1], False, [0], 1)
    return BACKWARD, (grad, x, weight, [after], *geometry, [False, True, False])


Q = torch.randn(4, 2, 64, 8)
CALLS = {
    "4 to 16 channels": narrow(4, 16),
    "16 to 4, transposed": narrow(16, 4, transposed=True),
    "10 channels": narrow(128, 10),
    "1d weight gradient": line_gradient(24, 48, 15, 512),
    "adaptive pooling, layouts differ": (
        aten._adaptive_avg_pool2d_backward.default,
        (image(4, 8, 6, 6), image(4, 8, 32, 32, last=False)),
    ),
    "average pooling, layouts differ": (
        aten.avg_pool2d_backward.default,
        (image(4, 8, 16, 16, last=False), image(4, 8, 32, 32), [3, 3], [2, 2], [1, 1], False, True, None),
    ),
    "bicubic": (
        aten.upsample_bicubic2d_backward.default,
        (image(2, 8, 32, 32), [32, 32], [2, 8, 16, 16], False, None, None),
    ),
    "inverse fft": (aten._fft_c2r.default, (torch.fft.rfft2(image(2, 8, 16, 16)), [2, 3], 2, 16)),
    "attention": (aten._scaled_dot_product_flash_attention_for_cpu.default, (Q, Q, Q)),
    "sort": (aten.sort.default, (torch.randn(64, 64), 0)),
    "gather's gradient": (aten.scatter_add.default, (Q[0, 0], 1, torch.zeros(64, 8, dtype=torch.int64), Q[1, 0])),
    "inverse of a matrix": (aten.linalg_inv_ex.default, (torch.eye(32).expand(4, 32, 32),)),
    "16-bit product": (aten.mm.default, (torch.randn(64, 48).bfloat16(), torch.randn(32, 48).bfloat16().t())),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("threads", [1, 2])
def test_single_calls(case, threads):
    function, call = CALLS[case]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert workspace_bytes(function, call) == transient(lambda: function(*call))
    finally:
        torch.set_num_threads(before)


def test_products_into_given_memory():
    left, right, out = torch.randn(64, 48), torch.randn(48, 96)[:, ::2], torch.empty(64, 48)
    found = workspace_bytes(aten.mm.out, (left, right), {"out": out})
    seen = physical_peak(lambda: torch.mm(left, right, out=out)).transient
    assert found == seen > 0, "the strided operand is copied"


def test_what_was_measured_holds_for_its_threads():
    """oneDNN has scratch for every thread."""
    before, call = torch.get_num_threads(), narrow(64, 64)
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found[threads] = workspace_bytes(*call), transient(lambda: call[0](*call[1]))
    torch.set_num_threads(before)
    assert all(foreseen == seen for foreseen, seen in found.values())


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scratch_grows_along_a_line_in_the_batch(form, dtype, monkeypatch):
    monkeypatch.setattr(workspace, "WORK", 0)
    workspace._found.cache_clear()
    x = torch.randn(24, 16, 12, 12).to(dtype, memory_format=form)
    weight = torch.randn(8, 16, 3, 3).to(dtype, memory_format=form)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    for count in (3, 8, 24):
        grad = torch.randn(count, 8, 12, 12).to(dtype, memory_format=form)
        call = (grad, x[:count], weight, None, *geometry, [False, True, False])
        for function, arguments in ((CONVOLUTION, (x[:count], weight, None, *geometry)), (BACKWARD, call)):
            seen = transient(lambda function=function, arguments=arguments: function(*arguments))
            assert workspace_bytes(function, arguments) == seen


def test_calls_that_are_not_made():
    """Too large ones, ones that fail on any argument, and operators of the user's."""
    with FakeTensorMode():
        huge = torch.empty(1 << 16, 1 << 13)
        assert workspace_bytes(aten.cumsum.default, (huge, 0), {}, huge) == 2 * huge.nbytes
    counts = torch.zeros(4, dtype=torch.int64)
    assert workspace_bytes(aten.bincount.default, (counts.float(),)) == 16
    assert workspace_bytes(aten.bernoulli.default, (torch.rand(64),)) == 0


def test_measuring_leaves_the_random_state_alone():
    workspace.measured.__globals__["_measured"].cache_clear()
    workspace._found.cache_clear()
    before = torch.get_rng_state()
    workspace_bytes(aten.bernoulli.default, (torch.rand(67),))
    drawn = torch.rand(3)
    torch.set_rng_state(before)
    torch.rand(67)
    assert torch.equal(torch.rand(3), drawn)


def test_operators_of_the_user_are_declared_not_run():
    ran = []

    @torch.library.custom_op("test_workspace::mine", mutates_args=())
    def mine(x: torch.Tensor) -> torch.Tensor:
        ran.append(x)
        return x.clone()

    operator, x = torch.ops.test_workspace.mine.default, torch.randn(8)
    assert workspace_bytes(operator, (x,)) == 0 and not workspace.is_counted(operator)
    workspace.declare(operator, lambda x: 3 * x.nbytes)
    assert workspace_bytes(operator, (x,)) == 96 and workspace.is_counted(operator) and not ran
    with pytest.raises(ValueError, match="declared before"):
        workspace.declare(operator, lambda x: 0)


def test_a_profile_of_the_users_own_is_left_alone():
    x, weight, geometry = arguments((2, 16, 9, 9), (16, 16, 3, 3))
    workspace._found.cache_clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        bound = workspace_bytes(CONVOLUTION, (x, weight, None, *geometry))
    assert bound >= workspace_bytes(CONVOLUTION, (x, weight, None, *geometry)) > 0


def test_settings_tell_whether_nnpack_is_used():
    """ATen unfolds images itself where NNPACK is off: another scratch, which must not be taken for the one before."""
    before = dispatch.settings()
    with torch.backends.nnpack.flags(enabled=False):
        assert dispatch.settings() != before
    assert dispatch.settings() == before
