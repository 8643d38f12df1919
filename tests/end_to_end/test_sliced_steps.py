"""Steps in slices of the batch, compiled: exact gradients, budgets kept, and clear words where there can be none."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.compiled import Compile
from helpers.nets import gradients, loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xconv_fx.compiler.candidates import Candidate, Variant
from xconv_fx.compiler.comparison import Comparison
from xconv_fx.compiler.feedback import Feedback
from xconv_fx.compiler.search import Search
from xconv_fx.errors import OptionError
from xconv_fx.measure import training_peak
from xconv_fx.step.explain import explain

BATCH = 8


def net(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Sequential:
    """Samples apart: convolutions, group norm, pooling, a classifier; one stage three times as large as the next."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        ]
        return nn.Sequential(*layers).to(dtype)


def images(dtype: torch.dtype = torch.float32, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.fixture(scope="module")
def tight(compile_model: Compile):
    """A third of Inductor's peak with exact codecs, in float64: beyond what the whole batch at once can do."""
    torch._dynamo.reset()
    model = net(torch.float64)
    # Tests run the uncompiled network between steps, which the first-step check would count as part of them.
    compiled = compile_model(model, mem_budget="33%", codecs="exact", verify="off")
    compiled(images(torch.float64))
    return compiled


def test_exact_gradients_in_a_third_of_the_memory(tight):
    x = images(torch.float64)
    assert_same(gradients(tight.model, x), gradients(net(torch.float64), x), 1e-9)
    plan = tight.plan
    assert plan.slices > 1 and plan.noise == 0
    peak = training_peak(tight.model, x, loss)
    assert peak.bytes <= plan.budget
    assert plan.audited_peak == pytest.approx(peak.bytes, rel=0.02)


def test_the_input_gets_its_gradient(compile_model):
    mine, theirs = (images(torch.float64).requires_grad_() for _ in range(2))
    compiled = compile_model(net(torch.float64), mem_budget="60%", codecs="exact", slices=4)
    loss(compiled(mine)).backward()
    loss(net(torch.float64)(theirs)).backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert compiled.plan.slices == 4


def test_dropout_is_drawn_once(compile_model):
    """With dropout right after the last weight, the weight's gradient is the sum of what the forward let through."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
            self.scale = nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(torch.tanh(self.body(x)), 0.5) * self.scale

    model = Scaled().double()
    compiled = compile_model(model, mem_budget="42%", codecs="exact", slices=4)
    torch.manual_seed(5)
    output = compiled(images(torch.float64))
    output.sum().backward()
    assert compiled.plan.held_slices < 4
    torch.testing.assert_close(model.scale.grad, output.detach().sum()[None] / 2)


def test_other_batch_sizes_are_planned_anew(compile_model):
    compiled = compile_model(net(), mem_budget="60%", codecs="exact")
    for batch in (8, 6, 12):
        assert_same(gradients(compiled.model, images(batch=batch)), gradients(net(), images(batch=batch)), 1e-4)


def test_sizes_written_into_the_model(compile_model):
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = net(torch.float64)[:9], nn.Linear(8 * 16 * 16, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).view(x.shape[0], -1))

    torch.manual_seed(2)
    model = Viewed()
    expected = gradients(model, images(torch.float64))
    compiled = compile_model(model, mem_budget="50%", codecs="exact")
    assert_same(gradients(compiled.model, images(torch.float64)), expected, 1e-9)
    assert compiled.plan.slices > 1


class Whole(nn.Module):
    """What a step does once, whatever its slices: parameters of the batch's size, changes in place, draws, results."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, BATCH, 3, padding=1)
        self.second = nn.Conv2d(BATCH, BATCH, 3, padding=1)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x.sub_(0.45).div_(0.225)
        self.steps.add_(1)
        weight = self.second.weight - self.second.weight.mean((1, 2, 3), keepdim=True)
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        y = nn.functional.silu(self.first(x))
        branch = nn.functional.silu(nn.functional.conv2d(y, weight / std.expand_as(weight), padding=1))
        y = y + branch * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.7).div_(0.7)
        state = torch.zeros(y.shape[0], 1, *y.shape[2:], dtype=y.dtype)
        y = torch.cat([y / (1 + 0.1 * self.steps), state], 1)
        return y, y.mean((2, 3)).detach(), y.argmax(1)


def test_what_a_step_does_once(compile_model):
    torch._dynamo.reset()
    theirs, start = Whole().double(), images(torch.float64)
    compiled = compile_model(copy.deepcopy(theirs), mem_budget="99%", codecs="exact", slices=4)
    seen = []
    for call, model in ((theirs, theirs), (compiled, compiled.model)):
        for step in range(2):
            torch.manual_seed(step)
            x = start.clone()
            results = call(x)
            results[0].square().mean().backward()
        gradients = [p.grad for p in model.parameters()]
        seen.append((*results, x, *model.buffers(), *gradients, torch.get_rng_state()))
        assert [value.requires_grad for value in results] == [True, False, False]
    torch.testing.assert_close(seen[1], seen[0])
    assert compiled.plan.slices == 4


def test_batch_norm_is_named_where_slices_are_impossible(compile_model):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))
    with pytest.raises(OptionError, match=r"slices=2.*as in batch normalisation .* in 1"):
        compile_model(model, mem_budget="70%", slices=2)(images())
    compiled = compile_model(model, mem_budget="88%")
    compiled(images())
    assert compiled.plan.slices == 1


class Normed(torch.autograd.Function):
    """Says that its gradient is of length 1 over all samples."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / gradient.norm()


class WithFunction(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.last, self.checkpointed = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), checkpointed

    def part(self, x):
        return Normed.apply(self.first(x)).relu()

    def forward(self, x):
        return self.last(checkpoint(self.part, x, use_reentrant=False) if self.checkpointed else self.part(x))


# Dynamo makes an instance of the function's class.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_functions_that_compute_their_own_gradient_are_not_sliced(compile_model, checkpointed):
    model = WithFunction(checkpointed)
    with pytest.raises(OptionError, match=r"slices=2.*autograd\.Function computes a gradient of its own"):
        compile_model(model, slices=2)(images())
    if not checkpointed:
        wanted = gradients(model, images())
        found = gradients(compile_model(model, mem_budget="90%", codecs="exact").model, images())
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slices": 3}, "write one of 2, 4, 8"),
        ({"slices": 4, "mode": "reduce-overhead"}, "CUDA graph overwrites"),
        ({"max_noise": 1e-9, "slices": 1, "mem_budget": "52%"}, "max_noise"),
        ({"max_slowdown": 0.0, "codecs": "exact"}, "max_slowdown"),
    ],
)
def test_limits_that_cannot_be_kept(compile_model, options, words):
    with pytest.raises(OptionError, match=words):
        compile_model(net(), **{"mem_budget": "35%", **options})(images())


def test_preferences():
    plans = {p: explain(net(), images(), mem_budget="40%", prefer=p).plans[0] for p in ("exact", "balanced", "speed")}
    assert plans["exact"].noise == 0 < plans["speed"].noise
    assert plans["speed"].time < plans["exact"].time
    assert plans["exact"].noise <= plans["balanced"].noise <= plans["speed"].noise


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_surface(tight, value):
    eager, spoilt = net(torch.float64), images(torch.float64)
    spoilt[2, 0, 8, 8] = value
    theirs, mine = gradients(eager, spoilt), gradients(tight.model, spoilt)
    assert not loss(tight.model(spoilt)).isfinite()
    for name, gradient in theirs.items():
        assert gradient.isfinite().all() == mine[name].isfinite().all(), name


def test_contiguous_volumes_where_channels_last_ones_do_not_fit(compile_model, monkeypatch):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.PReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.Conv3d(8, 2, 1))
    x = torch.randn(2, 2, 20, 20, 20)
    expected, ways, attempt = gradients(model, x), Comparison.candidates, Search.attempt
    tried, contiguous = [], Variant(relayout=False)

    def both(self: Comparison, feedback: Feedback) -> list[Candidate]:
        # Which layout takes less memory, and whether the other is looked at, depends on the processor.
        return [*[way for way in ways(self, feedback) if way.variant.relayout][:1], Candidate(contiguous, 0.0, 0.0)]

    def refused(self: Search, variant: Variant, feedback: Feedback) -> object:
        tried.append(variant)
        return None if variant.relayout else attempt(self, variant, feedback)

    monkeypatch.setattr(Comparison, "candidates", both)
    monkeypatch.setattr(Search, "attempt", refused)
    compiled = compile_model(model, mem_budget="95%", slices=1, codecs="keep,recompute,bitmask")
    assert_same(gradients(compiled.model, x), expected, 1e-3)
    assert tried[-1] == contiguous
    assert training_peak(compiled.model, x, loss).bytes <= compiled.plan.budget
