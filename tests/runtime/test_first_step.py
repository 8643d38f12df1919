"""When a step begins and ends, what is measured of it, and how calls are counted, on graphs that are not compiled."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import device_thread
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks as registry
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from xconv_fx.measure import physical_peak
from xconv_fx.plan import Plan
from xconv_fx.runtime.first_step import CheckedGraph, StepCheck
from xconv_fx.runtime.session import Graph, GraphKey, GraphRecord

KB = 1024
RECORD = GraphRecord(Graph(GraphKey(0, 0), None, 0, 0, 0, 0, False), Plan("cpu", None, 0, 0, "", 0, ()))


class Judge:
    """Notes what it is told, and takes the steps over `limit` to be settled."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.limit = 1 << 60
        self.peaks: list[int] = []
        self.more: list[int] = []

    def measured(self, graphs: Sequence[CheckedGraph], peak: int) -> bool:
        self.peaks.append(peak)
        return peak > self.limit

    def called(self, graphs: Sequence[CheckedGraph]) -> None:
        self.more += [graph.most for graph in graphs]


class Net(nn.Module):
    """Two layers, one of them checked; its parameters take 4 kB, its results 64 kB."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 64, bias=False)
        self.check = StepCheck(judge)
        self.graph = CheckedGraph(lambda *inputs: (nn.functional.linear(*inputs),), self.check, RECORD)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x, self.layer.weight)[0]


@pytest.fixture
def judge() -> Judge:
    return Judge()


@pytest.fixture
def net(judge: Judge) -> Iterator[Net]:
    net = Net(judge)
    yield net
    assert net.check.memory is None, "the allocator is put back"


X = torch.randn(256, 16)


def loss(y: Tensor) -> Tensor:
    return (y - 1).square().mean()


def expected(net: Net, step: Any) -> int:
    """What the profiler measures of the step."""
    net.zero_grad()
    found = physical_peak(step, resident=[X, net.layer.weight]).bytes
    net.zero_grad()
    return found


def run(net: Net, k: int = 1) -> None:
    for _ in range(k):
        loss(net(X)).backward()
        net.zero_grad()


def test_the_first_step_is_measured_to_the_byte_and_no_other(net: Net, judge: Judge) -> None:
    run(net, 3)
    wanted = expected(net, lambda: loss(net(X)).backward())
    assert set(judge.peaks) == {wanted}
    found = len(judge.peaks)
    run(net, 3)
    assert len(judge.peaks) == found


def test_what_runs_anew_is_measured_again(net: Net, judge: Judge) -> None:
    run(net, 2)
    found = len(judge.peaks)
    net.check.again()
    run(net, 2)
    assert judge.peaks[found:] == judge.peaks[:found]


def test_an_optimiser_belongs_to_the_step_but_its_state_does_not(net: Net, judge: Judge) -> None:
    optimiser = torch.optim.Adam(net.parameters(), foreach=True)
    scratch: list[Tensor] = []
    optimiser.register_step_pre_hook(lambda *_: scratch.append(torch.empty(900 * KB, dtype=torch.uint8)))
    optimiser.register_step_post_hook(lambda *_: scratch.clear())
    loss(net(X)).backward()
    backward = judge.peaks[-1]
    optimiser.step()
    assert net.check.memory is None, "the optimiser ends the step"
    gradient = net.layer.weight.nbytes
    resident = X.nbytes + net.layer.weight.nbytes
    # Adam's temporaries are of the gradient's size, and single numbers; its state, two of them, is not counted.
    assert resident + gradient + 900 * KB <= judge.peaks[-1] < resident + 4.5 * gradient + 900 * KB
    assert judge.peaks[-1] > backward


def test_what_a_program_does_after_the_backward_is_no_part_of_the_step(net: Net, judge: Judge) -> None:
    """Such as an evaluation, or another model's step."""
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    for ends in (optimiser.step, lambda: None):
        net.check.again()
        loss(net(X)).backward()
        alone = judge.peaks[-1]
        torch.empty(5000 * KB, dtype=torch.uint8)
        ends()
        torch.empty(5000 * KB, dtype=torch.uint8)
        net(X)
        assert max(judge.peaks) == alone
        net.zero_grad()
    net.check.stop()


def test_hooks_of_optimisers_end_with_their_steps(net: Net, judge: Judge) -> None:
    """Two checked models and a hook of the user's share a registry, which must not change while it is gone through."""
    seen: list[object] = []
    users = register_optimizer_step_post_hook(lambda optimiser, *_: seen.append(optimiser))
    other = Net(Judge())
    optimiser = torch.optim.SGD([*net.parameters(), *other.parameters()], 0.1)
    (loss(net(X)) + loss(other(X))).backward()
    optimiser.step()
    users.remove()
    assert seen == [optimiser]
    assert net.check.memory is None and other.check.memory is None
    before = len(registry)
    net.check.again()
    del other
    gc.collect()
    net(X)
    assert len(registry) == before - 1, "three hooks less, one more"
    net.check.stop()


def test_another_models_optimiser_does_not_end_the_step(net: Net, judge: Judge) -> None:
    other = nn.Linear(300, 300)
    optimiser = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    y = net(X)
    other(torch.randn(2, 300)).sum().backward()
    optimiser.step()
    assert net.check.memory is not None and not judge.peaks
    loss(y).backward()
    assert len(judge.peaks) == 1
    net.check.stop()


def test_calls_are_one_step_until_a_backward(net: Net, judge: Judge) -> None:
    views = [X, torch.randn(256, 16)]

    def step() -> None:
        sum(loss(net(view)) for view in views).backward()  # type: ignore[union-attr]

    step()
    assert net.graph.most == 2 and net.graph.outstanding == 0
    net.check.stop()
    net.zero_grad()
    assert judge.peaks[-1] == physical_peak(step, resident=[*views, net.layer.weight]).bytes


def test_evaluation_with_gradients_enabled_is_no_step(net: Net, judge: Judge) -> None:
    for _ in range(3):
        net(X)
    assert net.graph.most == 1 and net.graph.outstanding == 0
    run(net)
    net.check.stop()
    assert set(judge.peaks) == {expected(net, lambda: loss(net(X)).backward())}
    with torch.no_grad():
        net(X)
    assert net.graph.outstanding == 0


def test_an_error_in_the_loss_leaves_nothing_behind(net: Net, judge: Judge) -> None:
    with pytest.raises(ZeroDivisionError):
        loss(net(X)) / (1 // 0)
    run(net, 2)
    assert set(judge.peaks) == {expected(net, lambda: loss(net(X)).backward())}


def test_an_error_in_the_backward_leaves_nothing_behind(net: Net, judge: Judge) -> None:
    y = net(X)
    y.register_hook(lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        loss(y).backward()
    del y
    run(net, 2)
    assert judge.peaks and judge.peaks[-1] == expected(net, lambda: loss(net(X)).backward())


def test_two_backwards_are_one_step(net: Net, judge: Judge) -> None:
    def step() -> None:
        y = net(X)
        y.mean().backward(retain_graph=True)
        loss(y).backward()

    step()
    assert len(judge.peaks) == 2 and judge.peaks[1] > judge.peaks[0]
    net.check.stop()
    assert judge.peaks[-1] == expected(net, step)


def test_a_step_over_its_budget_is_settled_at_the_end_of_the_backward(net: Net, judge: Judge) -> None:
    judge.limit = 1
    loss(net(X)).backward()
    assert len(judge.peaks) == 1 and net.check.memory is None
    run(net, 2)
    assert len(judge.peaks) == 1


def test_another_loss_is_measured_once(net: Net, judge: Judge) -> None:
    run(net, 2)
    before = len(judge.peaks)
    for _ in range(4):
        torch.cat([net(X)] * 9).square().mean().sqrt().backward()
    net.zero_grad()
    assert len(judge.peaks) > before and max(judge.peaks[before:]) > 2 * max(judge.peaks[:before])
    before = len(judge.peaks)
    run(net, 3)
    assert len(judge.peaks) == before, "both losses are known"


def test_another_loss_is_told_where_backwards_run_in_a_thread_of_their_own(net: Net, judge: Judge) -> None:
    """As on CUDA, where that thread cannot count the nodes of the loss."""
    for _ in range(2):
        device_thread.backward(loss(net(X)))
    before = len(judge.peaks)
    for _ in range(4):
        device_thread.backward(torch.cat([net(X)] * 9).square().mean().sqrt())
    net.zero_grad()
    assert len(judge.peaks) > before and max(judge.peaks[before:]) > 2 * max(judge.peaks[:before])
    before = len(judge.peaks)
    for _ in range(3):
        device_thread.backward(loss(net(X)))
    assert len(judge.peaks) == before, "both losses are known"


def test_losses_that_always_differ_are_not_measured_for_ever(net: Net, judge: Judge) -> None:
    for k in range(30):
        sum(net(X).mean() * i for i in range(k + 1)).backward()  # type: ignore[union-attr]
    before = len(judge.peaks)
    for k in range(30, 40):
        sum(net(X).mean() * i for i in range(k + 1)).backward()  # type: ignore[union-attr]
    assert len(judge.peaks) == before


def test_calls_beyond_the_plan_are_told_where_nothing_is_measured(net: Net, judge: Judge) -> None:
    run(net, 2)
    (net(X).mean() + net(X).mean()).backward()
    net.check.stop()
    assert judge.more == [2]


def test_calls_within_a_backward_are_part_of_its_step(net: Net, judge: Judge) -> None:
    run(net, 2)
    before = len(judge.peaks)
    for _ in range(2):
        y = checkpoint(net, X, use_reentrant=False) + checkpoint(net, X, use_reentrant=False)
        y.square().mean().backward()
    net.check.stop()
    assert net.graph.outstanding == 0
    assert len(judge.peaks) >= before


def test_code_before_the_first_graph_is_part_of_the_step(net: Net, judge: Judge) -> None:
    """A graph without a backward, or one that is not compiled, once the session of a compiled model is known."""
    images = torch.randn(512, 32)

    def model(x: Tensor) -> Tensor:
        net.check.enter((x,))
        with torch.no_grad():
            x = x.sin().cos()[::2, ::2].contiguous()
        y = net(x)
        net.check.leave()
        return y

    def step() -> None:
        loss(model(images)).backward()
        net.zero_grad()

    for _ in range(4):
        step()
    wanted = physical_peak(step, resident=[images, net.layer.weight]).bytes
    assert judge.peaks[-1] == wanted
    assert wanted > 3 * images.nbytes, "the images and two results of their size"


def test_no_step_is_measured_from_its_middle(net: Net, judge: Judge) -> None:
    """A graph is compiled anew in the first of two calls: the next whole step is measured, not the rest of this one."""
    run(net, 2)
    before = len(judge.peaks)

    def call(new: bool = False) -> Tensor:
        net.check.enter((X,))
        if new:
            net.check.again()
        y = net(X)
        net.check.leave()
        return y

    def step(new: bool) -> None:
        (loss(call(new)) + loss(call())).backward()
        net.zero_grad()

    step(new=True)
    assert len(judge.peaks) == before
    step(new=False)
    assert judge.peaks[-1] == expected(net, lambda: step(new=False))


def test_steps_of_every_size_are_measured(net: Net, judge: Judge) -> None:
    """A smaller batch, whose graph is compiled in its first step, is measured when it comes again."""

    def step(x: Tensor, new: bool = False) -> None:
        net.check.enter((x,))
        if new:
            net.check.again()
        y = net(x)
        net.check.leave()
        loss(y).backward()
        net.zero_grad()

    run(net, 2)
    small = X[:64].clone()
    step(small, new=True)
    before = len(judge.peaks)
    step(X)
    assert len(judge.peaks) == before
    step(small)
    assert len(judge.peaks) == before + 1
    step(small)
    assert len(judge.peaks) == before + 1


def test_graphs_under_compilation_are_not_steps(net: Net, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDPOptimizer runs what it has compiled on fake tensors, to know the strides of results."""
    monkeypatch.setattr("xconv_fx.hooks.compile_id", lambda: (0, 0))
    loss(net(X)).backward()
    assert not judge.peaks and net.graph.most == 0


def test_parameters_of_the_whole_model_are_resident(judge: Judge) -> None:
    judge.module = nn.Linear(100, 100)
    net = Net(judge)
    run(net, 2)
    alone = expected(net, lambda: loss(net(X)).backward())
    assert judge.peaks[-1] == alone + sum(p.nbytes for p in judge.module.parameters())


def test_a_device_that_cannot_be_watched_is_said_once(
    net: Net, judge: Judge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(device: str) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("xconv_fx.runtime.first_step.StepMemory", refuse)
    run(net, 3)
    assert not judge.peaks
    assert [record.getMessage() for record in caplog.records] == [
        "the memory of training steps is not checked: no compiler"
    ]


def test_on_cuda_the_first_run_of_a_graph_is_not_judged(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor times its kernels in it, with a buffer of the cache's size; the next step is what a step takes."""
    allocated = [0]
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 0)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: allocated[0])
    net, judge.limit = Net(judge), 1000
    net.graph.record = GraphRecord(RECORD.graph, Plan("cuda", None, 0, 0, "", 0, ()))
    for taken in (50_000, 900, 900):
        allocated[0] = taken
        loss(net(X)).backward()
    net.check.stop()
    assert set(judge.peaks) == {900}
