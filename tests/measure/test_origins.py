"""What is alive at the peak, and which line led to it."""

from __future__ import annotations

import contextlib
import gc
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from xconv_fx.measure import Peak, origins, training_peak
from xconv_fx.measure.origins import Allocation, Recording, alive_in_history, recorded, tensors_of

BIG = (256, 1024)
MEGABYTE = 4 * 256 * 1024


def line_of(text: str) -> int:
    """The line of this file that has the text, which it may have only once."""
    source = Path(__file__).read_text().splitlines()
    (line,) = (
        number for number, content in enumerate(source, start=1) if text in content and "line_of(" not in content
    )
    return line


def helper(x: Tensor) -> Tensor:
    return torch.exp(x)  # allocates in a helper


def test_the_peak_and_what_is_alive_at_it():
    with recorded() as recording:
        first = torch.ones(BIG)  # the first
        second = helper(first)
        del first
        third = torch.empty(BIG)  # the third
        del second
    assert recording.peak == Peak(0, 2 * MEGABYTE)
    # The first peak of equal height is the one that is shown.
    rows = [(item.bytes, item.operation, item.frame.line, item.frame.function) for item in recording.alive]
    name = inspect.currentframe().f_code.co_name
    assert rows == [
        (MEGABYTE, "aten::ones", line_of("# the first"), name),
        (MEGABYTE, "aten::exp", line_of("# allocates in a helper"), "helper"),
    ]
    assert third is not None and all(item.frame.file == __file__ for item in recording.alive)


def test_lines_survive_the_garbage_collector():
    """Nodes of the profiler know their parents only as long as somebody holds these."""
    with recorded() as recording:
        kept = helper(torch.ones(BIG))
    gc.collect()
    assert {item.operation for item in recording.alive} == {"aten::ones", "aten::exp"}
    assert all(item.frame is not None for item in recording.alive) and kept is not None


def test_the_backward_is_told_by_the_forward_that_it_belongs_to():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return torch.tanh(x)  # the activation

    net, x = Net(), torch.randn(2, 3, 32, 32)
    with recorded([net, x]) as recording:
        output = net(x)
        output.mean().backward()
    rows = {(item.operation, item.frame.line) for item in recording.alive if item.bytes > 1000}
    assert ("TanhBackward0 of aten::tanh", line_of("# the activation")) in rows
    for parameter in net.parameters():
        parameter.grad = None
    assert recording.peak == training_peak(net, x, torch.mean)


def test_operators_of_python_are_found_in_their_function():
    def product(x: Tensor) -> Tensor:
        return x * 2

    with recorded() as recording:
        product(torch.ones(BIG))
    frame = recording.alive[1].frame
    assert (frame.function, frame.exact) == ("product", False) and "(in product)" in str(frame)


def test_without_lines_there_are_operations():
    with recorded(lines=False) as recording:
        torch.ones(BIG)
    assert recording.alive == (Allocation(MEGABYTE, "aten::ones"),)


def test_resident_tensors_count_once():
    net = nn.Linear(4, 4, bias=False)
    net.weight.grad = torch.zeros(4, 4)
    assert len(tensors_of([net, {"x": (net.weight, 3)}])) == 4
    with recorded([net, {"x": (net.weight, torch.empty(3, device="meta"))}]) as recording:
        pass
    assert recording.peak == Peak(128, 0) and recording.alive == ()


def test_errors_of_the_block_pass():
    with pytest.raises(KeyError), recorded():
        raise KeyError


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is there; what blocks allocate on it is `gpu.bytes`."""

    class Gpu:
        bytes = 0

        @contextlib.contextmanager
        def record(self, recording, device):
            yield
            recording.peak = Peak(0, self.bytes)

    gpu = Gpu()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(origins, "_cuda", gpu.record)
    return gpu


def test_what_is_measured_is_where_the_tensors_are_and_else_where_the_block_allocates(gpu):
    """A test of CPU code must not pass on a machine with a GPU because that stays empty."""
    x = torch.zeros(1000)
    for resident in ([x], []):
        with recorded(resident) as recording:
            torch.zeros(500)
        assert recording.peak.transient == 2000
    gpu.bytes = 700
    with recorded() as recording:
        torch.zeros(500)
    assert recording.peak == Peak(0, 700)
    with recorded([x]) as recording:
        torch.zeros(500)
    assert recording.peak == Peak(4000, 2000)


def test_a_cuda_history():
    """Entries as `torch.cuda.memory._snapshot` has them: a free counts when it is completed."""

    def entry(action: str, addr: int, size: int, line: int = 1) -> dict[str, object]:
        library = {"filename": torch.__file__, "line": 1, "name": "inner"}
        frames = [library, {"filename": __file__, "line": line, "name": "step"}]
        return {"action": action, "addr": addr, "size": size, "frames": frames, "stream": 0}

    history = [
        entry("segment_alloc", 0, 10**6),
        entry("alloc", 0, 512, line=5),
        entry("alloc", 512, 2048, line=6),
        entry("free_requested", 0, 512),
        entry("free_completed", 0, 512),
        entry("alloc", 4096, 100, line=7),
    ]
    assert [(item.bytes, item.frame.line) for item in alive_in_history(history)] == [(2048, 6), (512, 5)]
    assert alive_in_history([]) == ()


def test_a_table_adds_up_what_one_line_allocates():
    recording = Recording()
    recording.peak = Peak(1000, 60)
    recording._find = lambda: (
        *(Allocation(10, f"op{i}") for i in range(4)),
        Allocation(15, "op0"),
        Allocation(5, "op9"),
    )
    assert [line.split() for line in recording.table(limit=2).splitlines()] == [
        ["1.00", "kB", "there", "before"],
        ["25", "B", "op0", "(2", "times)"],
        ["10", "B", "op1"],
        ["25", "B", "3", "more"],
    ]
