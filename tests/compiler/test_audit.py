"""The replay of wrapper code: by hand, with peaks that are known, and of a real step against the allocator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xconv_fx.compiler.audit import Audit
from xconv_fx.cost_model.allocator import block_bytes
from xconv_fx.hooks.fake import cudnn_layouts, fake_mode
from xconv_fx.measure import training_peak
from xconv_fx.plan.report import read_json

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

KB = 1024
X = torch.empty(KB // 4)  # 1 kB

FORWARD = """
import torch
aten = torch.ops.aten
async_compile = AsyncCompile()
cpp_fused_0 = async_compile.cpp_pybinding(['const float*'], 'a kernel that must never be compiled')
async_compile.wait(globals())
del async_compile

def call(args):
    primals_1, = args
    args.clear()
    assert_size_stride(primals_1, (256, ), (1, ))
    buf0 = empty_strided_cpu((1024, ), (1, ), torch.float32)  # 4 kB
    buf1 = empty_strided_cpu((2, 256), (256, 1), torch.float32)  # 2 kB
    cpp_fused_0(primals_1, buf0, buf1)
    del primals_1
    buf2 = reinterpret_tensor(buf0, (32, 32), (32, 1), 0); del buf0  # reuse
    cpp_fused_0(buf2)
    del buf1
    buf3 = torch.ops.aten.mm.default(buf2, buf2)  # 4 kB
    buf4 = empty_strided_cpu((256, ), (1, ), torch.float32)  # 1 kB
    return (buf4, buf3, )
"""

BACKWARD = """
import torch

def call(args):
    saved, tangents_1 = args
    args.clear()
    buf0 = empty_strided_cpu((512, ), (1, ), torch.float32)  # 2 kB
    del saved
    buf1 = empty_strided_cpu((1536, ), (1, ), torch.float32)  # 6 kB
    del buf0
    return (buf1, )
"""


def test_allocations_reuse_and_releases():
    audit = Audit()
    # The input and 4 + 2 kB; then, with the second buffer gone, 4 + 4 + 1: the caller holds the input throughout.
    forward = audit.forward(FORWARD, [X], results=1)
    assert forward.bytes == 10 * KB
    assert {label for label, _ in forward.alive} >= {"input", "aten.mm.default"}
    # After the call: the input, the result of 1 kB and the saved 4 kB.
    assert audit.loss(5 * KB).bytes == 11 * KB
    # The tangent of 1 kB comes to what is alive; saved goes before the large buffer comes.
    tangent = torch.empty(KB // 4)
    backward = audit.backward(BACKWARD, [torch.empty(KB), tangent], [False, True])
    assert backward.bytes == (1 + 1 + 1 + 2 + 6) * KB


def test_resident_bytes_are_alive_throughout():
    audit = Audit(resident_bytes=100)
    assert audit.forward(FORWARD, [X], results=1).bytes == 10 * KB + 100
    assert audit.loss(0).bytes == 6 * KB + 100


def test_outputs_dropped_by_the_caller_are_not_saved():
    audit = Audit()
    audit.forward(FORWARD, [X], results=2)
    assert [tuple(value.shape) for value in audit.results] == [(256,), (32, 32)]
    assert audit.saved == []


def test_workspace_of_extern_kernels_counts():
    source = """
import torch
def call(args):
    x, w = args
    args.clear()
    buf0 = torch.ops.aten.convolution.default(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return (buf0, )
"""
    x, weight = torch.empty(1, 4, 8, 8, dtype=torch.float64), torch.empty(4, 4, 3, 3, dtype=torch.float64)
    unfolded = 4 * 9 * 64 * 8
    peak = Audit().forward(source, [x, weight], results=1)
    assert peak.bytes == x.nbytes + weight.nbytes + 4 * 64 * 8 + unfolded


def test_a_real_step_agrees_with_the_allocator(tmp_path):
    torch._dynamo.reset()
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    x, report = torch.randn(8, 3, 32, 32), tmp_path / "plan.json"
    # In bytes, for Inductor by itself takes more on torch 2.12 than on later ones.
    options = {"mem_budget": 2_650_000, "report": str(report)}
    measured = training_peak(torch.compile(model, backend="xconv", options=options), x, lambda y: y.square().mean())
    (plan,) = read_json(report)
    assert any(choice.codec != "keep" for choice in plan.choices)
    assert plan.audited_peak == pytest.approx(measured.bytes, rel=0.05)
    assert measured.bytes <= plan.budget


def test_a_gradient_that_is_laid_out_anew_counts_twice():
    """The engine holds what the loss gave, the code reads a copy."""
    code = """
import torch

def call(args):
    tangents_1, = args
    args.clear()
    buf0 = empty_strided_cpu((256, ), (1, ), torch.float32)  # 1 kB
    del tangents_1
    return (buf0, )
"""
    plain = torch.empty(1, 4, 8, 8)
    for gradient, expected in ((plain, 2), (plain.contiguous(memory_format=torch.channels_last), 3)):
        audit = Audit()
        audit.forward("def call(args):\n    return ()", [], 0)
        assert audit.backward(code, [gradient], [True]).bytes == expected * KB


@pytest.mark.skipif(not hasattr(torch._C._dynamo.guards, "copy_if_misaligned"), reason="new in torch 2.13")
def test_inputs_that_may_be_copied_ask_no_fake_for_its_address(monkeypatch):
    """As CUDA code does with its inputs: torch printed a warning of it, which every user saw once."""
    code = """
import torch
from torch._C._dynamo.guards import copy_if_misaligned

def call(args):
    x, = args
    args.clear()
    x = copy_if_misaligned(x)
    y = empty_strided_cpu((256,), (1,), torch.float32)
    del x
    return (y,)
"""

    def asks(tensor):
        raise AssertionError("a fake has no address")

    monkeypatch.setattr("torch._C._dynamo.guards.copy_if_misaligned", asks)
    assert Audit().forward(code, [torch.empty(256)], results=1).bytes == 2 * KB


CUDA = """
import torch

def call(args):
    x, weight = args
    args.clear()
    y = torch.ops.aten.convolution.default(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return (y,)
"""


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_on_cuda_workspaces_and_blocks_count_as_the_planner_counts_them(order):
    """A budget that the audit holds against less than the plan is not enforced."""
    with fake_mode():
        x, weight = (torch.empty(size, device="cuda") for size in ((2, 3, 31, 31), (5, 3, 3, 3)))
        x = x.to(memory_format=order)
    with cudnn_layouts():
        peak = Audit().forward(CUDA, [x, weight], results=1)
    result = 4 * 2 * 5 * 31 * 31
    workspace = 0 if order == torch.channels_last else x.nbytes + result
    assert peak.bytes == sum(map(block_bytes, (x.nbytes, weight.nbytes, result))) + workspace
