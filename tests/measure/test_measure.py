"""The measured peak against allocations that are known, and against a second observer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xconv_fx.measure import Peak, interleaved_times, physical_peak, running_maximum, storage_bytes, training_peak

KB = 1024


def block(kilobytes: int) -> torch.Tensor:
    return torch.empty(kilobytes * KB, dtype=torch.uint8)


def test_sequence_of_allocations() -> None:
    def step() -> None:
        a, b = block(400), block(200)
        del a
        c = block(300)
        del b, c
        block(450)

    assert physical_peak(step) == Peak(resident=0, transient=600 * KB)


def test_nested_calls_and_kept_results() -> None:
    kept = []

    def inner() -> torch.Tensor:
        scratch = block(500)
        return scratch[:1].clone()

    def step() -> None:
        kept.append(block(100))
        kept.append(inner())
        kept.append(inner())

    # The second scratch block comes on top of what was kept and of the one-byte result of the first call.
    assert physical_peak(step).transient == 600 * KB + 2


def test_intermediate_results_of_an_expression_count() -> None:
    a = torch.ones(64, 64)
    assert physical_peak(lambda: (a + a).sum()).transient == a.nbytes + 4


def test_resident_storages_count_once() -> None:
    base = torch.empty(1000)
    other = torch.empty(10, dtype=torch.float64)
    peak = physical_peak(lambda: block(1), resident=[base, base[:10], base.view(10, 100), other])
    assert peak == Peak(resident=4080, transient=KB)
    assert peak.bytes == 4080 + KB


def test_storage_bytes_skips_other_devices() -> None:
    assert storage_bytes([torch.empty(10), torch.empty(7, device="meta")], "cpu") == 40


def test_freeing_what_was_there_before_is_not_credited() -> None:
    """Whether or not an earlier profile happened to see the block being allocated."""
    for seen in (False, True):
        held: list[torch.Tensor] = []
        if seen:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
                held.append(block(800))
        else:
            held.append(block(800))

        def step(held: list[torch.Tensor] = held) -> None:
            held.clear()
            block(300)

        assert physical_peak(step).transient == 300 * KB


def test_running_maximum_of_odd_histories() -> None:
    assert running_maximum([]) == 0
    assert running_maximum([(1, -50), (2, 10)]) == 10
    assert running_maximum([(1, 10), (1, 10), (1, 10)]) == 10
    assert running_maximum([(1, 10), (2, 20), (1, -10), (3, 15), (2, -20)]) == 35


def test_unmeasurable_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"device: .*'meta'.*cpu, cuda"):
        physical_peak(lambda: None, device="meta")


class Storages(TorchDispatchMode):
    """A second observer: the bytes of every storage that an operator returns, until Python sees it die."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.highest = 0
        self.watched: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def ignore(self, tensors: list[torch.Tensor]) -> None:
        self.watched.update(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self.watched:
            return
        self.watched.add(address)
        self.current += size
        self.highest = max(self.highest, self.current)
        weakref.finalize(storage, self._died, address, size)

    def _died(self, address: int, size: int) -> None:
        self.watched.discard(address)
        self.current -= size


def test_agrees_with_a_second_observer_on_a_convolutional_network() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    inputs = torch.randn(4, 3, 32, 32)
    measured = training_peak(model, inputs, lambda out: out.square().mean())
    assert all(parameter.grad is None for parameter in model.parameters())

    resident = [inputs, *model.parameters(), *model.buffers()]
    assert measured.resident == sum(tensor.nbytes for tensor in resident)
    observer = Storages()
    observer.ignore(resident)
    with observer:
        model(inputs).square().mean().backward()
    # The observer cannot see what an operator allocates and frees inside itself (layout copies of a convolution).
    assert observer.highest <= measured.transient <= 1.15 * observer.highest


def test_measurements_repeat_and_follow_the_batch() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
    inputs = torch.randn(2, 1, 24, 24)
    first, second = (training_peak(model, inputs, torch.sum) for _ in range(2))
    assert first == second
    smaller = training_peak(model, inputs[:1].clone(), torch.sum)
    assert smaller.transient < first.transient


def test_further_residents_are_counted() -> None:
    model = nn.Linear(4, 4)
    target = torch.zeros(2, 4)
    inputs = torch.randn(2, 4)
    plain = training_peak(model, inputs, lambda out: (out - target).sum())
    counted = training_peak(model, [inputs], lambda out: (out - target).sum(), resident=[target])
    assert counted.resident - plain.resident == target.nbytes


def test_nothing_is_written_to_stderr() -> None:
    """In a process of its own, because Kineto reads its log level when it is first used."""
    program = (
        "import torch; from xconv_fx.measure import physical_peak; print(physical_peak(lambda: torch.ones(8)).bytes)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("32\n", "")


def test_errors_of_the_step_come_through() -> None:
    def step() -> None:
        raise ZeroDivisionError("the step's own")

    with pytest.raises(ZeroDivisionError):
        physical_peak(step)
    assert physical_peak(lambda: block(2)).transient == 2 * KB


def test_interleaved_times_runs_in_turn_and_takes_the_median() -> None:
    calls: list[str] = []

    def fast() -> None:
        calls.append("fast")

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    times = interleaved_times({"fast": fast, "slow": slow}, repeats=3, warmup=1)
    assert calls == ["fast", "slow", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert times["fast"] < 0.01 < 0.02 <= times["slow"]


def test_interleaved_times_needs_a_round() -> None:
    with pytest.raises(ValueError, match="repeats: 0"):
        interleaved_times({}, repeats=0)
