"""CUDA's autocast rules on CPU tensors, against torch's: the lists of its header, its kernels on fake tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from xconv_fx.device import cuda_autocast as rules
from xconv_fx.device.cuda_autocast import cuda_autocast
from xconv_fx.hooks.dispatch import autocast_cuda_included

IMAGE, VOLUME = (2, 4, 8, 8), (2, 4, 6, 6, 6)


def listed(macro: str) -> list[str]:
    """The operators of a list in torch's header, as "name.overload"."""
    header = Path(torch.__path__[0], "include/ATen/autocast_mode.h").read_text()
    body = re.search(rf"#define AT_FORALL_{macro}\(_\)(.*?)\n\n", header, re.DOTALL)
    assert body is not None
    found = [".".join(filter(None, each)) for each in re.findall(r"_\((\w+)(?:, (\w+))?\)", body[1])]
    return [name for name in found if not is_of_named_dimensions(name)]


def is_of_named_dimensions(name: str) -> bool:
    """Whether an operator takes dimensions by name, as in torch 2.12: Dynamo compiles none that do."""
    return re.search(r"[dD]imname|\.names_", name) is not None


@pytest.mark.parametrize(
    ("macro", "names"),
    [
        ("LOWER_PRECISION_FP", rules.LOWER_PRECISION),
        ("FP32", rules.FLOAT32),
        ("FP32_SET_OPT_DTYPE", rules.FLOAT32_RESULT),
        ("PROMOTE", rules.WIDEST),
    ],
)
def test_the_lists_are_those_of_torch(macro, names):
    assert sorted(names.split()) == sorted(listed(macro))


def test_every_kernel_of_the_key_has_a_rule():
    known = {name for names in (rules.LOWER_PRECISION, rules.FLOAT32, rules.FLOAT32_RESULT, rules.WIDEST)
             for name in names.split()} | {*rules.FLOAT32_OVERLOAD, "binary_cross_entropy"}  # fmt: skip
    # cuDNN's own operators, which no model on the CPU calls.
    library = {"cudnn_convolution", "cudnn_convolution_transpose", "_cudnn_rnn"}
    # From torch 2.14 on; its kernel casts nothing, as the calls below show, and stays.
    kept = {"linalg_matrix_sqrth"}
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    names = {name.removeprefix("aten::") for name in registered}
    assert {name for name in names if not is_of_named_dimensions(name)} - library - kept == known


def tensors(device: str):
    """Tensors of every kind on a device."""
    make = {"wide": torch.float32, "half": torch.bfloat16, "double": torch.float64}
    return {
        f"{kind}{len(size)}": torch.ones(size, dtype=dtype, device=device)
        for kind, dtype in make.items()
        for size in (IMAGE, VOLUME, (4, 4, 3, 3), (4, 4), (4,))
    } | {"kernel": torch.ones(4, 4, 3, 3, device=device), "labels": torch.zeros(4, dtype=torch.int64, device=device)}


CALLS = {
    "convolution": lambda t: F.conv2d(t["wide4"], t["kernel"]),
    "convolution, same": lambda t: F.conv2d(t["wide4"], t["kernel"], padding="same"),
    "mixed convolution": lambda t: F.conv2d(t["half4"], t["kernel"]),
    "linear": lambda t: F.linear(t["wide2"], t["wide2"], t["wide1"]),
    "matmul": lambda t: t["wide2"] @ t["half2"],
    "matmul, double": lambda t: t["double2"] @ t["double2"],
    "einsum": lambda t: torch.einsum("ij,jk->ik", t["wide2"], t["wide2"]),
    "prelu": lambda t: F.prelu(t["wide4"], t["wide1"]),
    "exp": lambda t: t["half2"].exp(),
    "power": lambda t: t["half2"] ** 2,
    "softmax": lambda t: t["half2"].softmax(1),
    "softmax, dtype": lambda t: t["half2"].softmax(1, dtype=torch.float64),
    "softmax of integers": lambda t: t["labels"].float().softmax(0),
    "sum": lambda t: t["half4"].sum((2, 3)),
    "sum of integers": lambda t: t["labels"].sum(),
    "norm": lambda t: t["half2"].norm(),
    "norm of rows": lambda t: t["half2"].norm(dim=1),
    "mean": lambda t: t["half4"].mean((2, 3)),
    "layer norm": lambda t: F.layer_norm(t["half2"], (4,), t["wide1"], t["wide1"]),
    "group norm": lambda t: F.group_norm(t["half4"], 2),
    "cross entropy": lambda t: F.cross_entropy(t["half2"], t["labels"]),
    "loss": lambda t: F.mse_loss(t["half2"], t["half2"]),
    "addcmul": lambda t: torch.addcmul(t["half2"], t["wide2"], t["half2"]),
    "addition": lambda t: t["half2"] + t["wide2"],
    "concatenation": lambda t: torch.cat([t["half2"], t["half2"]]),
    "max pooling": lambda t: F.max_pool3d(t["half5"], 2),
    "average pooling": lambda t: F.avg_pool3d(t["half5"], 2),
    "padding": lambda t: F.pad(t["half5"], (1,) * 6, mode="replicate"),
    "upsampling": lambda t: F.interpolate(t["half5"], scale_factor=2, mode="trilinear"),
    "nearest": lambda t: F.interpolate(t["half4"], scale_factor=2),
}
if hasattr(torch.linalg, "matrix_sqrth"):
    CALLS["root of a matrix"] = lambda t: torch.linalg.matrix_sqrth(t["wide2"])
    CALLS["root of a double matrix"] = lambda t: torch.linalg.matrix_sqrth(t["double2"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_kernels_on_cuda(dtype):
    """Without gradients, fake tensors say what torch's kernels for CUDA do."""
    found, expected = {}, {}
    with FakeTensorMode():
        elsewhere = tensors("cuda")
        before = torch.get_autocast_dtype("cuda")
        try:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", dtype)
            expected = {name: call(elsewhere).dtype for name, call in CALLS.items() if mixes(name, dtype)}
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)
        here = tensors("cpu")
        with cuda_autocast(dtype):
            found = {name: call(here).dtype for name, call in CALLS.items() if mixes(name, dtype)}
    assert found == expected
    assert len(set(found.values())) > 2


def mixes(name: str, dtype: torch.dtype) -> bool:
    """Whether torch accepts the call: the widest of bfloat16 and float32 is defined under bfloat16 only."""
    return dtype == torch.bfloat16 or name != "addcmul"


def test_it_ends():
    x, weight = torch.randn(IMAGE), torch.randn(4, 4, 3, 3, requires_grad=True)
    with cuda_autocast(torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        result = F.conv2d(x, weight)
        result.float().sum().backward()
    assert result.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda")
    # The kernels are torch's own again, which cast nothing on the CPU.
    with autocast_cuda_included():
        assert F.conv2d(x, weight).dtype == torch.float32


def test_it_ends_after_an_error():
    with pytest.raises(RuntimeError, match="with_logits"), cuda_autocast(torch.float16):
        F.binary_cross_entropy(torch.rand(4), torch.rand(4))
    assert not torch.is_autocast_enabled("cuda")
    assert F.conv2d(torch.randn(IMAGE), torch.randn(4, 4, 3, 3)).dtype == torch.float32
