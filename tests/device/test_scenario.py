"""What a plan is made for: its options, and what they add to a plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xconv_fx.cost_model.device import DEVICES
from xconv_fx.cost_model.gpus import GPUS
from xconv_fx.device import rates
from xconv_fx.device.scenario import OPTIMIZERS, Scenario
from xconv_fx.errors import OptionError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpu": "h1000"}, "gpu='h1000': did you mean 'h100'"),
        ({"gpu": "tpu-v4"}, "write one of v100, .*rtx5090"),
        ({"gpu": "a100", "device": "cpu"}, "gpu='a100': a GPU is not a CPU"),
        ({"device": "tpu"}, "device='tpu': .*write one of cpu, cuda"),
        ({"amp": "int8"}, "amp='int8': .*bf16, fp16"),
        ({"amp": "bf16", "gpu": "t4"}, "amp='bf16': a t4 has no bfloat16 arithmetic; write fp16"),
        ({"amp": "fp16", "device": "cpu"}, "amp='fp16': CPUs do not train in float16; write bf16"),
        ({"optimizer": "adan"}, "optimizer='adan': did you mean 'adam'"),
        ({"channels_last": "yes"}, "channels_last='yes': write True or False"),
        ({"gpu": ["a100"]}, "gpu=.*write one of"),
    ],
)
def test_what_makes_no_sense(given, message):
    with pytest.raises(OptionError, match=message):
        Scenario.parse(**given)


def test_a_gpu_implies_cuda():
    assert Scenario.parse(gpu="l4") == Scenario.parse(device="cuda", gpu="l4")
    assert Scenario.parse(gpu="l4").moves and not Scenario.parse().moves


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sgd", lambda p: torch.optim.SGD(p)),
        ("momentum", lambda p: torch.optim.SGD(p, momentum=0.9)),
        ("adam", lambda p: torch.optim.Adam(p)),
        ("adamw", lambda p: torch.optim.AdamW(p)),
    ],
)
def test_the_state_is_what_torch_keeps(name, make):
    """Beside one number a parameter, of the steps so far."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3).to(torch.bfloat16))
    model[1].requires_grad_(False)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    kept = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.dim())
    assert Scenario.parse(optimizer=name).optimizer_bytes(model.parameters()) == kept


def test_every_optimizer_is_tested():
    assert set(OPTIMIZERS) == {"sgd", "momentum", "adam", "adamw"}


def test_rates_are_those_of_the_gpu():
    with Scenario.parse(gpu="t4").in_effect("cpu"):
        assert rates.spec("cuda:0") == GPUS["t4"].spec()
        assert rates.spec("cpu").name == "cpu"
    assert rates.spec("cuda") == DEVICES["cuda"]


def test_autocast_of_the_cpu():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with Scenario.parse(device="cpu", amp="bf16").in_effect("cpu"):
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
        assert torch.conv2d(x, weight).dtype == torch.bfloat16


def test_notes_are_for_cuda_alone():
    assert Scenario.parse(device="cpu").notes == () == Scenario.parse().notes
    text = " ".join(Scenario.parse(device="cuda").notes)
    assert all(part in text for part in ("512 bytes", "2 MiB", "1.07 GB a convolution", "CUDA context"))
