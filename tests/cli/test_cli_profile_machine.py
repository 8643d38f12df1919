"""`xconv profile-machine`: what it prints, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from xconv_fx.cli import main
from xconv_fx.cli.arguments import FAILED, OK
from xconv_fx.cli.profile_machine import DEVICES
from xconv_fx.cost_model import device
from xconv_fx.cost_model.device import DeviceSpec
from xconv_fx.device.rates import Machine, spec
from xconv_fx.tools import profile_machine

MEASURED = DeviceSpec("cpu", 1e9, 2e9, 3e9, 4e9, 5e9, launch=6e-6, calibrated=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    monkeypatch.setenv("XCONV_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path / "cache"


measure = profile_machine.measure


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Nothing is measured: `MEASURED` comes out, and what was asked for is recorded."""
    calls = []

    def stand_in(kind):
        calls.append((kind, torch.get_num_threads()))
        return MEASURED

    monkeypatch.setattr(profile_machine, "measure", stand_in)
    return calls


def test_numbers_are_shown_and_kept(capsys, cache, asked):
    threads = torch.get_num_threads()
    assert main(["profile-machine", "--device", "cpu"]) == OK
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["copy", "1.00", "20.0", "GB/s"] in rows and ["start", "of", "a", "kernel", "6.00", "2.00", "us"] in rows
    assert ["float32", "convolutions", "2.00", "190", "Gflop/s"] in rows
    assert str(Machine.of("cpu").path) in out
    assert spec("cpu") == MEASURED and asked == [("cpu", threads)]


def test_threads_are_set_for_the_measurement_alone(capsys, asked):
    before = torch.get_num_threads()
    assert main(["profile-machine", "--device", "cpu", "--threads", "3"]) == OK
    assert asked == [("cpu", 3)] and torch.get_num_threads() == before
    assert "3 threads" in capsys.readouterr().out
    assert not spec("cpu").calibrated


def test_json_is_all_that_is_printed(capsys):
    assert main(["profile-machine", "--device", "cpu", "--json"]) == OK
    out = capsys.readouterr().out
    assert out == Machine.of("cpu").path.read_text()
    assert json.loads(out)["measured"]["weight16"] == 5e9


MISTAKES = [
    (["--threads", "many"], ["--threads 'many'", "--threads 4"]),
    (["--threads", "0"], ["--threads '0'", "--threads 4"]),
    (["--device", "tpu"], ["tpu", "'cpu', 'cuda'"]),
    (["--tread", "2"], ["unknown argument '--tread'", "'--threads'"]),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES, ids=lambda value: " ".join(value)[:30])
def test_mistakes_are_told_what_to_type_next(capsys, asked, arguments, told):
    assert main(["profile-machine", *arguments]) == FAILED
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and not asked
    for text in told:
        assert text in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(capsys, asked):
    assert main(["profile-machine", "--device", "cuda"]) == FAILED
    error = capsys.readouterr().err
    assert "--device cuda: torch" in error and "try:   --device cpu" in error
    assert main(["profile-machine", "--device", "cuda", "--threads", "2"]) == FAILED
    assert "leave --threads out" in capsys.readouterr().err
    assert not asked


def test_a_cache_that_cannot_be_written(capsys, cache):
    cache.write_text("a file where the folder should be")
    assert main(["profile-machine", "--device", "cpu"]) == FAILED
    captured = capsys.readouterr()
    assert captured.out == "" and str(cache) in captured.err and "XCONV_FX_CACHE=DIR" in captured.err


def test_the_devices_are_those_of_the_cost_model():
    assert set(DEVICES) == set(device.DEVICES)


def test_help_does_not_wait_for_torch(capsys):
    code = (
        "import sys; from xconv_fx.cli import main\n"
        "try: main(['profile-machine', '--help'])\n"
        "finally: assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)


def test_the_former_name_still_works(capsys):
    assert main(["calibrate", "--device", "cpu", "--json"]) == OK
    out, err = capsys.readouterr()
    assert json.loads(out)["measured"]["weight16"] == 5e9 and "xconv calibrate is now xconv profile-machine" in err


@pytest.mark.parametrize(("native", "half"), [(False, torch.float16), (True, torch.bfloat16)])
def test_bfloat16_is_measured_where_a_gpu_has_it(monkeypatch, native, half):
    """Not where it is emulated, which torch calls supported as well unless it is asked."""
    seen = []
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(profile_machine, "convolution_rates", lambda kind, dtype: seen.append(dtype) or (1.0, 1.0))
    monkeypatch.setattr(profile_machine, "bandwidth", lambda kind: 1.0)
    monkeypatch.setattr(profile_machine, "start_time", lambda kind: 1.0)
    measure("cuda")
    assert seen == [torch.float32, half]
