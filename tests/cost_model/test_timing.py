from __future__ import annotations

import subprocess
import sys

import pytest

from xconv_fx.cost_model.device import DEVICES, RATES, DeviceSpec, device
from xconv_fx.cost_model.timing import REARRANGING, conv_flops, few_channels, linear_flops, seconds

TOY = DeviceSpec("toy", bandwidth=100.0, flops32=10.0, flops16=40.0, weight32=5.0, weight16=20.0, launch=0.5)


def test_seconds_is_the_longer_of_arithmetic_and_traffic() -> None:
    assert seconds(0, 0, TOY) == 0.5
    assert seconds(30, 100, TOY) == 3.5
    assert seconds(30, 1000, TOY) == 10.5
    assert seconds(80, 100, TOY, "torch.bfloat16") == seconds(80, 100, TOY, "float16") == 2.5


def test_weight_gradients_have_rates_of_their_own() -> None:
    assert seconds(0, 0, TOY, weight_flops=30) == 6.5
    assert seconds(30, 100, TOY, weight_flops=30) == 9.5
    assert seconds(0, 0, TOY, "bfloat16", weight_flops=30) == 2.0


def test_rearranging_comes_on_top_and_is_slower_than_a_copy() -> None:
    assert seconds(30, 100, TOY, rearranged=100) == 3.5 + REARRANGING


def test_few_channels_take_longer_than_their_flops() -> None:
    assert few_channels(1, 1) == 9
    assert few_channels(2, 10**9) == few_channels(10**9, 2) == pytest.approx(2)
    assert few_channels(64, 64) < 1.1


def test_conv_flops_of_known_layers() -> None:
    """ResNet-50's first layer has 118 million multiply-adds for an image of 224x224."""
    assert conv_flops(1, 3, 64, (7, 7), (112, 112)) == 2 * 118_013_952
    assert conv_flops(2, 32, 32, (3, 3), (8, 8), groups=32) == 2 * 2 * 32 * 9 * 64
    assert conv_flops(1, 1, 1, (2, 2, 2), (3, 3, 3)) == 2 * 8 * 27
    assert linear_flops(4, 5, 6) == conv_flops(4, 5, 6, (), ()) == 240
    with pytest.raises(ValueError, match="groups: 2 does not divide 3 and 4"):
        conv_flops(1, 3, 4, (1,), (1,), groups=2)


def test_devices_by_name() -> None:
    assert device("cuda:1") is DEVICES["cuda"]
    assert device("cpu").name == "cpu"
    with pytest.raises(ValueError, match=r"'tpu'.*cpu, cuda"):
        device("tpu")


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("field", [*RATES, "launch"])
def test_rates_are_positive(field, value) -> None:
    with pytest.raises(ValueError, match=field):
        DeviceSpec("toy", **{**dict.fromkeys(RATES, 1.0), "launch": 0.0, field: value})


def test_the_cost_model_imports_no_torch() -> None:
    modules = ("memory", "greedy", "program", "solver", "noise", "timing", "device")
    script = "import sys; " + "".join(f"import xconv_fx.cost_model.{name}; " for name in modules)
    subprocess.run([sys.executable, "-c", script + "sys.exit('torch' in sys.modules)"], check=True)
