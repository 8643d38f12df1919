"""What cannot work raises before a step runs and says what to do; what merely has nothing to plan trains as before."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from helpers.compiled import Compile
from helpers.nets import loss
from torch import Tensor, nn

from xconv_fx.errors import BudgetInfeasibleError, DoubleBackwardError, OptionError
from xconv_fx.options.budget import parse_size
from xconv_fx.units import format_size, sufficient_size


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        )


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mem_bugdet": "8GB"}, r"mem_bugdet='8GB': no such option; did you mean 'mem_budget'"),
        ({"mem_budget": "8 bananas"}, r"mem_budget='8 bananas': .*8GB"),
        ({"mem_budget": -1}, r"mem_budget=-1: "),
        ({"mem_budget": "-2GB"}, r"mem_budget='-2GB': "),
        ({"mem_budget": 0}, r"mem_budget=0: "),
        ({"mem_budget": "0%"}, r"mem_budget='0%': "),
        ({"codecs": "quantise"}, r"codecs='quantise': no codec 'quantise'; did you mean 'quantize'"),
        ({"probes": 0}, r"probes=0: 0 is not a positive int"),
        ({"probes": {"conv9": 8}, "mem_budget": "1GB"}, r"probes='conv9': no layer matches.*the layers are .*3"),
        ({"mode": "fast"}, r"mode='fast': .*max-autotune"),
        ({"report": "/no/such/folder/plan.json"}, r"report=.*does not exist; create it first"),
        ({"inductor": {"reorder_for_peak_memory": True}}, r"inductor.reorder_for_peak_memory=True: it cannot be set"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    model = net()
    compiled = torch.compile(model, backend="xconv", options=options)
    with pytest.raises(OptionError, match=message):
        compiled(images())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_budget_below_the_parameters_names_one_that_works(compile_model: Compile) -> None:
    model = net()
    running = model[1].running_mean.clone()
    with pytest.raises(BudgetInfeasibleError) as caught:
        compile_model(model, mem_budget="1kB")(images())
    error = caught.value
    assert torch.equal(model[1].running_mean, running), "no step has run"
    assert error.budget == 1000 < error.smallest
    assert error.consumers and error.consumers[0][1] > 0
    assert f"smallest feasible budget is {format_size(parse_size(sufficient_size(error.smallest)))}" in str(error)
    assert all(label in str(error) for label, _ in error.consumers)
    suggested = re.search(r"mem_budget='([^']+)', a smaller batch", str(error))
    assert suggested is not None
    for budget in (error.smallest, suggested[1]):
        compiled = compile_model(copy.deepcopy(model), mem_budget=budget)
        loss(compiled(images())).backward()
        assert compiled.plan.audited_peak <= compiled.plan.budget
        torch._dynamo.reset()
    with pytest.raises(BudgetInfeasibleError):
        compile_model(copy.deepcopy(model), mem_budget=error.smallest * 9 // 10)(images())


def test_model_without_convolutions_trains(compile_tightly: Compile) -> None:
    eager = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    x = torch.randn(64, 32, dtype=torch.float64)
    compiled = compile_tightly(copy.deepcopy(eager), x, codecs="exact")
    for model in (eager, compiled.model):
        loss(model(x)).backward()
    for mine, theirs in zip(compiled.model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_model_with_nothing_to_compress_trains_or_says_so(compile_model: Compile) -> None:
    eager = nn.Linear(8, 8).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    compiled = compile_model(copy.deepcopy(eager), mem_budget="1MB")
    for model in (eager, compiled.model):
        loss(model(x)).backward()
    torch.testing.assert_close(compiled.model.weight.grad, eager.weight.grad, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
    with pytest.raises(BudgetInfeasibleError, match="parameters, buffers and inputs"):
        compile_model(copy.deepcopy(eager), mem_budget="500B")(x)


class Complex(nn.Module):
    """A convolution followed by a complex mask in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.mask = nn.Parameter(torch.randn(8, 16, 9, dtype=torch.complex64))
        self.head = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        frequencies = torch.fft.rfft2(torch.relu(self.conv(x))) * self.mask
        return self.head(torch.relu(torch.fft.irfft2(frequencies)))


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
def test_complex_values_train_as_with_inductor(compile_tightly: Compile) -> None:
    """Inductor's own gradient of the complex parameter differs from eager's, so Inductor is what to compare with."""
    model = Complex()
    plain = copy.deepcopy(model)
    compiled = compile_tightly(copy.deepcopy(model), images(), codecs="exact")
    for each in (torch.compile(plain), compiled.model):
        loss(each(images())).backward()
    for mine, theirs in zip(compiled.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


class Embedded(nn.Module):
    """Images made of a table's rows, whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8, sparse=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(self.table(index).permute(0, 3, 1, 2))))


def test_sparse_gradients_train(compile_tightly: Compile) -> None:
    eager = Embedded()
    index = torch.randint(50, (4, 16, 16), generator=torch.Generator().manual_seed(0))
    compiled = compile_tightly(copy.deepcopy(eager), index, codecs="exact")
    for model in (eager, compiled.model):
        loss(model(index)).backward()
    for mine, theirs in zip(compiled.model.parameters(), eager.parameters(), strict=True):
        found, expected = (grad.to_dense() if grad.is_sparse else grad for grad in (mine.grad, theirs.grad))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_double_backward_is_refused(compile_tightly: Compile) -> None:
    x = images().requires_grad_()
    compiled = compile_tightly(net(), x)
    (gradient,) = torch.autograd.grad(loss(compiled(x)), x, create_graph=True)
    with pytest.raises(DoubleBackwardError, match=r"double backward: .*model\._orig_mod"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("codecs", ["exact", "quantize,bitmask", "probe,bitmask"])
def test_values_that_are_not_finite_surface(compile_tightly: Compile, codecs: str, value: float) -> None:
    eager = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    compiled = compile_tightly(copy.deepcopy(eager), images(), codecs=codecs)
    spoilt = images()
    spoilt[0, 0, 8, 8] = value
    losses = [loss(model(spoilt)) for model in (eager, compiled.model)]
    for each in losses:
        assert not each.isfinite()
        each.backward()
    for (name, theirs), mine in zip(eager.named_parameters(), compiled.model.parameters(), strict=True):
        if not theirs.grad.isfinite().all():
            assert not mine.grad.isfinite().all(), f"{name} hides what is not finite"
    assert compiled.plan.saved_share < 1 or {choice.codec for choice in compiled.plan.choices} - {"keep"}
