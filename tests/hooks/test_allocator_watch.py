"""The watch of the CPU allocator beside the profiler, on blocks and on steps."""

from __future__ import annotations

import threading

import torch
from torch import nn

from xconv_fx.hooks import allocator_watch
from xconv_fx.hooks.allocator_watch import CpuWatch
from xconv_fx.measure import physical_peak

KB = 1024


def block(kilobytes: int) -> torch.Tensor:
    return torch.empty(kilobytes * KB, dtype=torch.uint8)


def test_counts_what_is_allocated_and_not_what_was_there() -> None:
    before = block(700)
    watch = CpuWatch()
    a, b = block(400), block(200)
    del before, a
    c = block(300)
    assert (watch.live, watch.most) == (500 * KB, 600 * KB)
    watch.restart()
    assert watch.most == 500 * KB
    assert watch.owns(b.data_ptr())
    assert watch.disown(b.data_ptr()) == 200 * KB
    assert (watch.live, watch.owns(b.data_ptr()), watch.disown(b.data_ptr())) == (300 * KB, False, 0)
    del b
    assert watch.live == 300 * KB
    watch.end()
    del c
    assert watch.live == 300 * KB, "nothing is counted any more"
    again = CpuWatch()
    kept = block(50)
    assert again.live == kept.nbytes
    again.end()


def test_watches_have_beginnings_of_their_own() -> None:
    outer = CpuWatch()
    first = block(100)
    inner = CpuWatch()
    second = block(10)
    del first
    assert (outer.live, outer.most) == (10 * KB, 110 * KB)
    assert (inner.live, inner.most) == (10 * KB, 10 * KB)
    outer.end()
    third = block(5)
    assert inner.live == second.nbytes + third.nbytes
    inner.end()


def test_a_pause_is_not_counted() -> None:
    watch = CpuWatch()
    allocator_watch.pause(True)
    during = block(100)
    allocator_watch.pause(False)
    after = block(1)
    del during
    assert (watch.live, watch.most) == (after.nbytes, after.nbytes)
    watch.end()


def test_all_threads_count() -> None:
    watch = CpuWatch()
    kept: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: kept.append(block(64)))
    thread.start()
    thread.join()
    assert watch.live == 64 * KB
    watch.end()


def test_equals_the_profiler_to_the_byte() -> None:
    """On steps of a few kinds, some of which take scratch inside an operator; beside a profile that runs."""
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, 2))
    volumes = nn.Sequential(nn.Conv3d(1, 4, 3), nn.GELU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(4 * 27, 3))
    recurrent = nn.LSTM(5, 7, batch_first=True)
    image, volume, sequence = torch.randn(2, 3, 20, 20), torch.randn(2, 1, 8, 8, 8), torch.randn(3, 4, 5)
    steps = (
        lambda: convolutions(image).square().mean().backward(),
        lambda: torch.nn.functional.cross_entropy(volumes(volume), torch.tensor([0, 2])).backward(),
        lambda: recurrent(sequence)[0].std().backward(),
    )
    for step in steps:
        step()  # libraries keep what they make at a first call
        found: list[int] = []

        def watched(step: object = step, found: list[int] = found) -> None:
            watch = CpuWatch()
            step()  # type: ignore[operator]
            found.append(watch.most)
            watch.end()

        for module in (convolutions, volumes, recurrent):
            module.zero_grad()
        profiled = physical_peak(watched).transient
        assert found == [profiled]
        assert profiled > 0


def test_many_may_watch_and_ones_that_nobody_holds_end() -> None:
    watching = allocator_watch._library().xconv_watching
    before = watching()
    watches = [CpuWatch() for _ in range(40)]
    kept = block(1)
    assert {watch.live for watch in watches} == {kept.nbytes} and watching() == before + 40
    del watches
    assert watching() == before
