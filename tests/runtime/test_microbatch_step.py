"""Slices of a batch without a compiler: an eager function run slice by slice against the same run at once."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import device_thread
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from xconv_fx import SampleGradients
from xconv_fx.measure import physical_peak
from xconv_fx.ops import sample_gradients
from xconv_fx.passes.batch_separability import BATCH as SHARED
from xconv_fx.passes.batch_separability import NOTHING, SAMPLES
from xconv_fx.planner.loss import Ends
from xconv_fx.planner.microbatches import Batch, Microbatches, PeakScenario
from xconv_fx.runtime.microbatch_step import MicrobatchedStep, Result, _Draws

BATCH, COUNT = 8, 4


def function(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    hidden = torch.tanh(F.conv2d(x, weight, padding=1) + bias[:, None, None])
    return hidden * hidden, hidden.argmax(1)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(BATCH, 3, 6, 6), (5, 3, 3, 3), (5,)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def microbatches(held: int, count: int = COUNT, draws: str = NOTHING, relaid: tuple[int, ...] = ()) -> Microbatches:
    return Microbatches(Batch(BATCH, (True, False, False), 0, 0, 0), count, held, draws, relaid)


@pytest.mark.parametrize("held", range(COUNT + 1))
@pytest.mark.parametrize("relaid", [(), (1,)])
def test_gradients_are_those_of_the_whole_batch(held, relaid):
    expected = inputs()
    found = inputs()
    whole, sliced = function(*expected), MicrobatchedStep(function, microbatches(held, relaid=relaid))(*found)
    torch.testing.assert_close(sliced, whole)
    assert not sliced[1].requires_grad
    weight = torch.linspace(-1, 1, whole[0].numel(), dtype=torch.float64).reshape(whole[0].shape)
    (whole[0] * weight).sum().backward()
    (sliced[0] * weight).sum().backward()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_channels_last_results_stay_so():
    x, weight, bias = inputs()
    last = x.detach().contiguous(memory_format=torch.channels_last)
    result, _ = MicrobatchedStep(function, microbatches(2))(last, weight, bias)
    assert result.stride() == function(last, weight, bias)[0].stride()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_results_lie_as_they_were_traced_for_the_batch(order):
    """Weights that were relaid make channels-last slices; what the caller gets does not depend on that."""
    x, weight, bias = inputs()
    last = weight.detach().contiguous(memory_format=torch.channels_last)
    whole = function(x, weight, bias)[0].contiguous(memory_format=order)
    traced = [Result(True, whole.stride()), Result(False, (36, 6, 1))]
    result, chosen = MicrobatchedStep(function, microbatches(2), traced)(x, last, bias)
    assert result.stride() == whole.stride() and chosen.stride() == (36, 6, 1)
    torch.testing.assert_close(result, whole)
    gaps = MicrobatchedStep(function, microbatches(2), [Result(True, (1000, 36, 6, 1)), Result(False)])(
        x, weight, bias
    )[0]
    torch.testing.assert_close(gaps, whole)


def test_a_second_backward_runs_every_forward_again():
    found, expected = inputs(), inputs()
    result = MicrobatchedStep(function, microbatches(2))(*found)[0].sum()
    result.backward(retain_graph=True)
    result.backward()
    (2 * function(*expected)[0].sum()).backward()
    torch.testing.assert_close(found[1].grad, expected[1].grad)
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


def test_writing_to_an_input_in_between_is_an_error():
    x, weight, bias = inputs()
    result = MicrobatchedStep(function, microbatches(0))(x, weight, bias)[0].sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_differentiating_twice_is_an_error():
    x, weight, bias = inputs()
    result = MicrobatchedStep(function, microbatches(1))(x, weight, bias)[0].sum()
    (gradient,) = torch.autograd.grad(result, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("held", [0, 2, 4])
def test_a_second_forward_draws_the_same_numbers(held):
    def dropped(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (F.dropout(x, 0.5) * weight[0, 0, 0, 0],)

    x, weight, bias = inputs()
    torch.manual_seed(3)
    (result,) = MicrobatchedStep(dropped, microbatches(held, draws=SAMPLES))(x, weight, bias)
    after = torch.rand(1)
    result.sum().backward()
    # result = mask(x) * w, so that d/dw of its sum is the sum over w: of the very numbers of the forward.
    torch.testing.assert_close(weight.grad[0, 0, 0, 0], result.detach().sum() / weight.detach()[0, 0, 0, 0])
    torch.manual_seed(3)
    MicrobatchedStep(dropped, microbatches(4, draws=SAMPLES))(x, weight, bias)
    assert torch.rand(1) == after, "the generator goes on as if nothing had been run again"


def test_slices_that_are_not_held_take_no_memory():
    def deep(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        for _ in range(6):
            x = torch.tanh(x * weight[0, 0, 0, 0])
        return (x.mean((1, 2, 3)),)

    def step(held: int) -> int:
        x, weight, bias = inputs(torch.float32)
        large = x.detach().repeat(1, 1, 16, 16)
        return physical_peak(
            lambda: MicrobatchedStep(deep, microbatches(held))(large, weight, bias)[0].sum().backward()
        ).transient

    peaks = [step(held) for held in range(COUNT + 1)]
    assert peaks == sorted(peaks)
    assert peaks[0] < 0.35 * peaks[COUNT]


@pytest.mark.parametrize("held", [0, COUNT])
def test_a_slices_results_are_gone_when_the_next_one_runs(held):
    made: list[weakref.ref[Tensor]] = []

    def watched(*leaves: Tensor) -> tuple[Tensor, ...]:
        assert all(result() is None for result in made)
        results = function(*leaves)
        made.extend(map(weakref.ref, results))
        return results

    MicrobatchedStep(watched, microbatches(held))(*inputs())[0].sum().backward()
    assert len(made) == 2 * (COUNT if held else 2 * COUNT)


def test_batch_counts():
    assert Batch(12, (), 0, 0, 0).counts() == [2, 3, 4, 6, 12]
    assert Batch(7, (), 0, 0, 0).counts() == [7]


def test_episodes_count_what_else_is_alive():
    batch = Batch(4, (True, False), inputs=400, input_gradients=0, gradients=50)
    ends = Ends(results=10, tangents=10, between=30, kept=10)
    none = Microbatches(batch, 4, 0).episodes(ends)
    assert none == (
        PeakScenario("forward", 300 + 40, 0),
        PeakScenario("loss", 300 + 3 * (10 + 30), -1),
        PeakScenario("backward", 300 + 90 + 50, 0),
        PeakScenario("forward", 300 + 120 + 50, 0, again=True),
    )
    every = Microbatches(batch, 4, 4, copies=7).episodes(ends)
    assert every == (
        PeakScenario("forward", 307 + 40, 3),
        PeakScenario("loss", 307 + 3 * (10 + 30), 3),
        PeakScenario("backward", 307 + 90 + 50, 2),
        PeakScenario("backward", 307 + 90, 3),
    )


def test_a_second_forward_knows_its_samples_in_a_thread_of_its_own():
    """Backwards on CUDA: what shares bits out among samples must weigh them as the first forward did."""
    seen, asked = SampleGradients(BATCH), []
    seen.squares[:] = torch.arange(1.0, 1 + BATCH)

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(sample_gradients.weights(len(x), x.device))
        return function(x, weight, bias)

    with seen.batch(range(BATCH)):
        result, _ = MicrobatchedStep(step, microbatches(1))(*inputs())
        device_thread.backward(result.sum())
    parts = seen.squares.chunk(COUNT)
    expected = [*parts, *reversed(parts[:-1])]
    torch.testing.assert_close(torch.cat(asked), torch.cat(expected))


@pytest.mark.parametrize("draws", [SAMPLES, SHARED])
def test_draws_are_those_of_the_devices_of_the_tensors(monkeypatch, draws):
    """Not of the current one, which in the backward's thread may be another than in the forward's."""
    touched: list[int] = []

    class Generator:
        def __init__(self, device: int) -> None:
            self.device = device

        def manual_seed(self, seed: int) -> None:
            touched.append(self.device)

    monkeypatch.setattr("torch.cuda.default_generators", [Generator(0), Generator(1)])
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device=0: torch.tensor([device]))
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device=0: touched.append(device))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    with FakeTensorMode():
        given = [torch.empty(BATCH, device="cuda:1"), torch.empty(3), 2]
    drawn = _Draws(microbatches(1, draws=draws), given)
    for run in (drawn.first_run, drawn.again):
        with run(0):
            pass
    assert touched and set(touched) == {1}
