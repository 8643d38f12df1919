"""`explain`: the plan that training would start from, without generating code or touching memory."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn

from xconv_fx.errors import BudgetInfeasibleError, OptionError, UnsupportedModelError
from xconv_fx.step.explain import explain

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

X = (2, 3, 16, 16)
# Bytes of the weights and biases of `net`.
PARAMETERS = 4 * (8 * 3 * 9 + 8 + 8 * 8 * 9 + 8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


@pytest.fixture(autouse=True)
def no_code(monkeypatch):
    """Generating code is an error."""
    from torch._inductor.graph import GraphLowering

    def refuse(*_: object) -> None:
        raise AssertionError("explain must not generate code")

    monkeypatch.setattr(GraphLowering, "codegen", refuse)
    torch._dynamo.reset()


def test_without_a_budget():
    (plan,) = explain(net(), torch.randn(X)).plans
    assert plan.budget is None and plan.audited_peak is None
    assert plan.predicted_peak == plan.baseline_peak > plan.fixed_bytes > 0
    assert {choice.codec for choice in plan.choices} <= {"keep"}


def test_with_a_budget():
    (plan,) = explain(net(), torch.randn(X), mem_budget="90%").plans
    assert plan.predicted_peak <= plan.budget < plan.baseline_peak
    # Bits for the mask, which is read beside the input gradient; the tensor itself is let go of before that.
    assert [choice.codec for choice in plan.choices] == ["bitmask"]
    (exact,) = explain(net(), torch.randn(X), mem_budget="100%", codecs="exact").plans
    assert exact.noise == 0


def test_a_model_on_the_meta_device_has_the_same_plan():
    with torch.device("meta"):
        model = net()
    (there,) = explain(model, torch.empty(X, device="meta"), mem_budget="90%").plans
    torch._dynamo.reset()
    (here,) = explain(net(), torch.randn(X), mem_budget="90%").plans
    assert (there.choices, there.predicted_peak, there.budget) == (here.choices, here.predicted_peak, here.budget)


class Broken(nn.Module):
    """Two graphs, the second of which begins with the activation."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.first, self.second, self.activation = net(), nn.Conv2d(8, 8, 3), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(self.activation(x))


def test_every_graph_of_a_broken_trace_has_a_plan():
    explanation = explain(Broken(torch.relu), torch.randn(X))
    assert len(explanation.plans) == 2
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(explanation)
        shown = console.export_text()
    assert "graph 1 of 2" in shown and "graph 2 of 2" in shown


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, torch.randn(X), mem_budget="100%")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_errors_have_their_own_types():
    with pytest.raises(BudgetInfeasibleError, match="smallest feasible"):
        explain(net(), torch.randn(X), mem_budget=1)
    with pytest.raises(OptionError, match="no such option"):
        explain(net(), torch.randn(X), mem_bugdet="1GB")
    with pytest.raises(ValueError, match="loss='cross'"):
        explain(net(), torch.randn(X), loss="cross")
    with pytest.raises(UnsupportedModelError, match="requires a gradient"):
        explain(net().requires_grad_(False), torch.randn(X))


def test_inputs_may_be_nested_and_integers():
    class Selecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net()

        def forward(self, images: dict[str, torch.Tensor], index: torch.Tensor, times: int) -> torch.Tensor:
            return self.layers(images["left"] + images["right"])[:, :times] * index[:, None, None, None]

    images = {"left": torch.randn(X), "right": torch.randn(X)}
    (plan,) = explain(Selecting(), images, torch.zeros(2, dtype=torch.int64), 4, mem_budget="100%").plans
    assert plan.predicted_peak <= plan.budget


def test_a_result_of_one_graph_may_be_changed_in_place_by_the_next():
    assert len(explain(Broken(nn.functional.relu_), torch.randn(X), device="cuda").plans) == 2


def test_nothing_is_allocated():
    """Parameters of a terabyte, and an input of 16."""
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Conv2d(2**17, 2**17, 4), nn.ReLU(), nn.Conv2d(2**17, 4, 1)), torch.empty(X)
    x = torch.empty((16, 2**17, 1024, 2048), device="meta")
    (plan,) = explain(model, x, device="cuda").plans
    assert plan.fixed_bytes > 17e12


def test_a_gpu_that_is_not_there():
    (plan,) = explain(net(), torch.randn(X), gpu="h100", mem_budget="95%").plans
    (here,) = explain(net(), torch.randn(X)).plans
    assert (plan.device, plan.gpu, plan.gpu_memory) == ("cuda:0", "h100", 80 * 10**9)
    assert plan.predicted_peak <= plan.budget
    assert {choice.residual for choice in plan.choices} == {choice.residual for choice in here.choices}
    # Blocks of 512 bytes, and workspaces that are assumed.
    assert plan.baseline_peak > here.baseline_peak and plan.fixed_bytes > here.fixed_bytes
    assert sum("cuDNN" in note or "allocator" in note for note in plan.notes) == 2 and not here.notes


def test_rates_are_those_of_the_gpu():
    slow, fast = (explain(net(), torch.randn(X), gpu=name, mem_budget="95%").plans[0] for name in ("t4", "h100"))
    assert slow.time > fast.time > 0


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_on_cuda(amp):
    (plan,) = explain(net(), torch.randn(X), device="cuda", amp=amp).plans
    (wide,) = explain(net(), torch.randn(X), device="cuda").plans
    expected = {"bf16": "bfloat16", "fp16": "float16"}[amp]
    floats = {choice.dtype for choice in plan.choices} - {"bool"}
    assert floats == {expected}
    assert plan.baseline_peak < wide.baseline_peak and plan.fixed_bytes == wide.fixed_bytes
    assert not torch.is_autocast_enabled("cuda")


def test_mixed_precision_on_the_cpu():
    (plan,) = explain(net(), torch.randn(X), device="cpu", amp="bf16").plans
    assert "bfloat16" in {choice.dtype for choice in plan.choices}


def test_channels_last_spares_copies():
    """Inductor leaves images of a network whose channels get fewer as they are, and cuDNN has to copy them."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
    (plain,) = explain(model, torch.randn(X), device="cuda").plans
    (laid_out,) = explain(model, torch.randn(X), device="cuda", channels_last=True).plans
    assert laid_out.baseline_peak < plain.baseline_peak
    assert laid_out.fixed_bytes == plain.fixed_bytes


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 0), ("momentum", 1), ("adam", 2), ("adamw", 2)])
def test_the_state_of_an_optimizer(optimizer, copies):
    (plain,) = explain(net(), torch.randn(X)).plans
    (plan,) = explain(net(), torch.randn(X), optimizer=optimizer).plans
    assert (plan.optimizer, plan.optimizer_bytes) == (optimizer, copies * PARAMETERS)
    assert plan.fixed_bytes - plain.fixed_bytes == plan.predicted_peak - plain.predicted_peak == plan.optimizer_bytes


def test_budgets_in_percent_are_named_in_bytes():
    # Of contiguous images Inductor by itself keeps a copy.
    x = torch.randn(X).contiguous(memory_format=torch.channels_last)
    with pytest.raises(BudgetInfeasibleError) as caught:
        explain(net(), x, mem_budget="1%")
    (plan,) = explain(net(), x).plans
    assert caught.value.budget == pytest.approx(plan.baseline_peak / 100, rel=0.05)


def test_slices_are_planned_once_traced():
    """What is compared is planned from the trace of the comparison: the plan is that of a trace of its own."""
    model, x = nn.Sequential(net(), nn.ReLU(), nn.Conv2d(8, 1, 3)), torch.randn(8, 3, 16, 16)
    (plan,) = explain(model, x, mem_budget="60%", codecs="exact").plans
    assert plan.slices > 1 and plan.predicted_peak <= plan.budget
    (fixed,) = explain(model, x, mem_budget="60%", codecs="exact", slices=plan.slices).plans
    assert fixed.held_slices == plan.held_slices and fixed.choices == plan.choices


def test_scenarios_that_make_no_sense():
    with pytest.raises(OptionError, match="gpu='h1000'"):
        explain(net(), torch.randn(X), gpu="h1000")


def test_the_same_code_is_planned_any_number_of_times():
    """Dynamo gives up on a piece of code after eight variants."""
    peaks = [explain(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8 + more, 8)).plans[0].predicted_peak for more in range(12)]
    assert peaks == sorted(peaks) and len(set(peaks)) == 12
