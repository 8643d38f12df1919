"""The calibration cache: what it is valid for, what it changes, and files that make no sense."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from torch import nn

from xconv_fx.cost_model.device import DEVICES, RATES, DeviceSpec
from xconv_fx.device import rates
from xconv_fx.device.rates import Machine, load, save, spec, specs
from xconv_fx.step.explain import explain
from xconv_fx.tools import profile_machine

SLOW = DeviceSpec("cpu", 1e9, 2e9, 3e9, 4e9, 5e9, launch=6e-6, calibrated=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    monkeypatch.setenv("XCONV_FX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def threads():
    """Sets torch's number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_generic_rates_without_a_calibration(cache):
    assert spec("cpu") is DEVICES["cpu"] and not spec("cpu").calibrated
    assert not cache.exists()
    with pytest.raises(ValueError, match="'tpu'"):
        spec("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_cuda_device_that_is_not_there_has_generic_rates():
    assert spec("cuda:1") is DEVICES["cuda"]


def test_what_was_saved_is_used(cache):
    path = save(Machine.of("cpu"), SLOW)
    assert spec("cpu") == SLOW
    assert list(cache.iterdir()) == [path]
    faster = dataclasses.replace(SLOW, bandwidth=7e12)
    assert save(Machine.of("cpu"), faster) == path
    assert spec("cpu") == faster


def test_a_calibration_is_of_a_number_of_threads(threads):
    threads(1)
    save(Machine.of("cpu"), SLOW)
    threads(2)
    assert not spec("cpu").calibrated
    threads(1)
    assert spec("cpu").calibrated


@pytest.mark.parametrize("change", [{"processor": "another"}, {"torch": "3.0"}, {"threads": None}, {"device": "cuda"}])
def test_a_calibration_is_of_one_machine_and_torch(change):
    here = Machine.of("cpu")
    save(here, SLOW)
    other = dataclasses.replace(here, **change)
    assert other.path != here.path and load(other) is None


def test_the_folder_is_where_caches_belong(monkeypatch, tmp_path):
    assert rates.folder() == tmp_path / "cache"
    monkeypatch.delenv("XCONV_FX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rates.folder() == tmp_path / "xconv-fx"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rates.folder() == tmp_path / ".cache" / "xconv-fx"


def _changed(**fields) -> str:
    data = json.loads(rates.to_json(Machine.of("cpu"), SLOW))
    return json.dumps({**data, **fields})


MALFORMED = {
    "empty": "",
    "not JSON": "bandwidth = 3",
    "no object": "[1, 2]",
    "of another format": _changed(format=0),
    "of another machine": _changed(machine=dataclasses.asdict(Machine("cpu", "x", 1, "2"))),
    "of an unknown machine": _changed(machine={"name": "x"}),
    "without rates": _changed(measured={}),
    "no number": _changed(measured={**dict.fromkeys(RATES, 1.0), "launch": "soon"}),
    "a rate of zero": _changed(measured={**dict.fromkeys(RATES, 0), "launch": 0}),
    "an infinite rate": _changed(measured={**dict.fromkeys(RATES, float("inf")), "launch": 0}),
    "a huge number": _changed(measured={**dict.fromkeys(RATES, 10**400), "launch": 0}),
    "deep": "[" * 100_000,
    "not UTF-8": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_told_once_and_ignored(text, cache, caplog):
    cache.mkdir()
    path = Machine.of("cpu").path
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with caplog.at_level(logging.WARNING, logger="xconv_fx"):
        assert spec("cpu") is spec("cpu") is DEVICES["cpu"]
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "xconv profile-machine" in record.getMessage()
    save(Machine.of("cpu"), SLOW)
    assert spec("cpu") == SLOW


def test_an_unreadable_file_is_ignored_too(cache, caplog):
    Machine.of("cpu").path.mkdir(parents=True)
    assert spec("cpu") is DEVICES["cpu"]
    assert "IsADirectoryError" in caplog.text
    caplog.clear()
    cache.rename(cache.with_name("away"))
    cache.write_text("a file where the folder should be")
    assert spec("cpu") is DEVICES["cpu"]
    assert "NotADirectoryError" in caplog.text


def test_specs_are_of_the_devices_that_hold_tensors():
    save(Machine.of("cpu"), SLOW)
    assert specs([torch.ones(1), 3, torch.ones(2), torch.ones(1, device="meta")]) == (SLOW,)
    assert specs([3, None]) == ()


def test_plans_use_the_calibration():
    def plan():
        torch._dynamo.reset()
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
        return explain(net, torch.randn(2, 3, 16, 16), mem_budget="100%", probes={"2": 8}).plans[0]

    generic = plan()
    save(Machine.of("cpu"), SLOW)
    slow = plan()
    assert (generic.calibrated, slow.calibrated) == (False, True)
    assert slow.time > 1.5 * generic.time > 0


# What is measured: not how fast this machine is, but that sensible numbers come out of small layers.

SMALL = (profile_machine.Layer(8, (8, 8)), profile_machine.Layer(4, (4, 4, 4)))


@pytest.fixture
def quick(monkeypatch):
    """Measurements of tiny layers and copies."""
    monkeypatch.setattr(profile_machine, "LAYERS", SMALL)
    monkeypatch.setattr(profile_machine, "BATCHES", {"cpu": (1, 2)})
    monkeypatch.setattr(profile_machine, "COPIED", {"cpu": 2**16})
    monkeypatch.setattr(profile_machine, "STARTED", 10)


def test_a_measurement_is_a_calibrated_spec(quick):
    measured = profile_machine.measure("cpu")
    assert measured.calibrated and measured.name == "cpu"
    assert 1e-8 < measured.launch < 1e-2 and measured.bandwidth > 1e6


def test_batches_grow_until_a_kernel_takes_long_enough(quick, monkeypatch):
    times = iter([0.001, 0.01, 0.001, 0.1, 0.05])
    monkeypatch.setattr(profile_machine, "_median", lambda call, kind: next(times))
    layer = SMALL[0]
    forward, grad_input, weight = profile_machine._layer_rates(layer, "cpu", torch.float32)
    assert forward == layer.flops(2) / 0.01 and grad_input == layer.flops(2) / 0.1
    assert weight == layer.flops(1) / 0.05


@pytest.mark.parametrize("layer", SMALL)
def test_the_three_convolutions_are_those_of_autograd(layer):
    x, weight, grad = profile_machine._operands(layer, 2, "cpu", torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    convolution = nn.functional.conv2d if x.dim() == 4 else nn.functional.conv3d
    output = convolution(x, weight, padding=1)
    expected = torch.autograd.grad(output, (x, weight), grad)
    with torch.no_grad():
        torch.testing.assert_close(profile_machine._forward(x, weight, grad), output)
        torch.testing.assert_close(profile_machine._input_gradient(x, weight, grad)[0], expected[0])
        torch.testing.assert_close(profile_machine._weight_gradient(x, weight, grad)[1], expected[1])
    assert layer.flops(2) == 2 * x.numel() * weight[0].numel()


def test_a_slow_measurement_is_not_repeated(monkeypatch):
    times = iter([9.0, 0.2, 0.1, 9.0, 1.0])
    monkeypatch.setattr(profile_machine, "_timed", lambda call, kind: next(times))
    assert profile_machine._median(lambda: None, "cpu") == pytest.approx(0.15)
    assert profile_machine._median(lambda: None, "cpu") == 1.0
