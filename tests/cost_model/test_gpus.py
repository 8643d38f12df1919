"""The table of GPUs."""

from __future__ import annotations

import pytest

from xconv_fx.cost_model.device import DEVICES, RATES
from xconv_fx.cost_model.gpus import GPUS


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_rates_are_below_the_data_sheets(gpu):
    spec = gpu.spec()
    assert (spec.name, spec.calibrated) == ("cuda", False)
    assert spec.bandwidth < gpu.bandwidth and spec.flops32 < gpu.flops32 and spec.flops16 < gpu.flops16
    # 16 bits are at least twice as fast, on tensor cores or not; nothing is faster than 3 Pflop/s or 10 TB/s.
    assert 1.9 <= gpu.flops16 / gpu.flops32 < 9 and gpu.flops16 < 3e15 and gpu.bandwidth < 10e12
    assert 16e9 <= gpu.memory < 200e9


def test_the_generic_device_is_an_a100():
    generic, spec = DEVICES["cuda"], GPUS["a100-40gb"].spec()
    for rate in (*RATES, "launch"):
        assert getattr(spec, rate) == pytest.approx(getattr(generic, rate), rel=0.05)


def test_newer_boards_are_faster():
    rates = [GPUS[name].spec().flops16 for name in ("t4", "v100", "a100", "h100")]
    assert rates == sorted(rates)
    assert GPUS["h200"].spec().flops16 == GPUS["h100"].spec().flops16
