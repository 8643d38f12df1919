"""Plans that were made before: compiled as they are, without a search, and refused where they do not fit."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xconv_fx.compiler import compile_graph, stored_plans
from xconv_fx.errors import BudgetExceededWarning, BudgetInfeasibleError, OptionError
from xconv_fx.plan import Plan
from xconv_fx.plan.report import read_json, write_json
from xconv_fx.step.explain import explain

X = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def build(width: int = 8, mixing: bool = True) -> nn.Sequential:
    """Convolutions whose samples meet in batch norm, or are apart."""
    torch.manual_seed(0)
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d if mixing else lambda channels: nn.GroupNorm(2, channels)
    layers: list[nn.Module] = []
    for before, after in ((3, width), (width, width), (width, width)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), norm(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 2, 1))


def gradients(model: Callable[[Tensor], Tensor], of: nn.Module) -> list[Tensor]:
    of.zero_grad()
    model(X).square().mean().backward()
    return [p.grad.clone() for p in of.parameters() if p.grad is not None]


def compiled(tmp_path: Path, model: nn.Module, **options: Any) -> tuple[list[Tensor], tuple[Plan, ...]]:
    """A step's gradients, and the plans."""
    torch._dynamo.reset()
    report = tmp_path / "report.json"
    step = torch.compile(model, backend="xconv", options={"report": report, "verify": "off", **options})
    return gradients(step, model), read_json(report)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XCONV_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XCONV_FX_PLAN_CACHE", "1")
    return tmp_path / "cache" / "plans"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was searched for so far."""
    found: list[object] = []
    search = compile_graph.search
    monkeypatch.setattr(compile_graph, "search", lambda request: found.append(request) or search(request))
    return found


@pytest.mark.parametrize("budget", ["70%", "99.9%", "2GB"])
@pytest.mark.parametrize("mixing", [True, False])
def test_a_second_compilation_does_not_search(tmp_path, cache, searches, budget, mixing):
    model = build(mixing=mixing)
    expected = gradients(model, model)
    first, (plan,) = compiled(tmp_path, model, mem_budget=budget, codecs="exact")
    second, (again,) = compiled(tmp_path, model, mem_budget=budget, codecs="exact")
    assert len(searches) == 1 and len(list(cache.iterdir())) == 1
    assert again == plan
    for one, other, exact in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, exact, rtol=1e-3, atol=1e-5)


def test_slices_are_compiled_without_another_proof(tmp_path, cache, searches):
    model = build(mixing=False)
    options = {"mem_budget": "70%", "codecs": "exact", "slices": 2}
    _, (plan,) = compiled(tmp_path, model, **options)
    _, (again,) = compiled(tmp_path, model, **options)
    assert again == plan and plan.slices == 2 and len(searches) == 1


def test_a_refusal_is_kept_as_well(tmp_path, cache, searches):
    errors = []
    for _ in range(2):
        with pytest.raises(BudgetInfeasibleError) as error:
            compiled(tmp_path, build(), mem_budget=1000)
        errors.append(error.value)
    first, second = errors
    assert len(searches) == 1
    assert (str(first), first.smallest, first.consumers) == (str(second), second.smallest, second.consumers)
    compiled(tmp_path, build(), mem_budget=first.smallest)


def test_what_is_not_the_same_is_searched_for(tmp_path, cache, searches):
    compiled(tmp_path, build(), mem_budget="70%")
    compiled(tmp_path, build(), mem_budget="71%")
    compiled(tmp_path, build(), mem_budget="70%", codecs="exact")
    compiled(tmp_path, build(width=4), mem_budget="70%")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    compiled(tmp_path, build(), mem_budget="70%")
    assert len(searches) == 5


def centred(apart: bool) -> Callable[[Tensor], Tensor]:
    """Two functions of one name, which Dynamo does not look into."""

    @torch._dynamo.allow_in_graph
    def centre(y: Tensor) -> Tensor:
        return y - y.mean((2, 3) if apart else 0, keepdim=True)

    return centre


class Centred(nn.Module):
    def __init__(self, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.centre = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), centred(apart)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.centre(self.first(x).relu()).relu())


def test_another_torch_and_other_sources_search_anew(tmp_path, cache, searches, monkeypatch):
    compiled(tmp_path, build(), mem_budget="70%")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", torch.__version__.replace("2.", "2.9"))
        patch.setattr("xconv_fx.step.backend.require_usable_torch", lambda: None)
        compiled(tmp_path, build(), mem_budget="70%")
    with monkeypatch.context() as patch:
        patch.setattr(stored_plans, "source_hash", lambda: "those of another version")
        compiled(tmp_path, build(), mem_budget="70%")
    assert len(searches) == 3 == len(list(cache.iterdir()))
    compiled(tmp_path, build(), mem_budget="70%")
    assert len(searches) == 3


def test_a_function_of_the_same_name_is_another(tmp_path, cache, searches):
    """One treats samples apart and may run in slices, the other does not."""
    for number, apart in enumerate((True, False), start=1):
        model = Centred(apart)
        expected = gradients(model, model)
        found, (plan,) = compiled(tmp_path, model, mem_budget="90%", codecs="exact")
        assert len(searches) == number and (plan.slices > 1) <= apart
        for one, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(one, exact, rtol=1e-3, atol=1e-5)


def test_nothing_is_kept_of_operators_of_the_users(tmp_path, cache, searches):
    @torch.library.custom_op("stored_plans::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)
    twice.register_autograd(lambda ctx, grad: 2 * grad)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build()

        def forward(self, x: Tensor) -> Tensor:
            return twice(self.body(x))

    for _ in range(2):
        compiled(tmp_path, Twice(), mem_budget="90%", codecs="exact")
    assert len(searches) == 2 and not cache.exists()


def test_a_cache_that_says_nonsense_is_searched_past(tmp_path, cache, searches):
    _, (plan,) = compiled(tmp_path, build(), mem_budget="70%", codecs="exact")
    (file,) = cache.iterdir()
    good = json.loads(file.read_text())
    first = good["plan"]["choices"][0]
    wrong = {
        "no JSON": "}",
        "another format": json.dumps({**good, "format": 0}),
        "another graph's": json.dumps({**good, "plan": {**good["plan"], "choices": [{**first, "residual": "other"}]}}),
        "no object": "null",
        "no plan": json.dumps({**good, "plan": None}),
        "a size that is none": json.dumps({**good, "baseline_peak": None}),
        "slices that are none": json.dumps({**good, "plan": {**good["plan"], "slices": "2"}}),
        "everything kept": json.dumps(
            {**good, "plan": {**good["plan"], "choices": [{**c, "codec": "keep"} for c in good["plan"]["choices"]]}}
        ),
    }
    for number, text in enumerate(wrong.values(), start=2):
        file.write_text(text)
        _, (found,) = compiled(tmp_path, build(), mem_budget="70%", codecs="exact")
        assert len(searches) == number and found == plan
        assert json.loads(file.read_text()) == good, "what was found is kept"


def test_the_cache_can_be_turned_off(tmp_path, cache, searches, monkeypatch):
    monkeypatch.setenv("XCONV_FX_PLAN_CACHE", "0")
    for _ in range(2):
        compiled(tmp_path, build(), mem_budget="70%")
    assert len(searches) == 2 and not cache.exists()


def test_a_folder_that_cannot_be_written_to_is_none(tmp_path, cache, searches, monkeypatch):
    monkeypatch.setattr(stored_plans.rates, "folder", lambda: Path("/proc/nowhere"))
    for _ in range(2):
        compiled(tmp_path, build(), mem_budget="70%")
    assert len(searches) == 2


# The option `plan`.


@pytest.mark.parametrize("mixing", [True, False])
def test_a_plan_is_compiled_as_it_was_made_ahead(tmp_path, searches, mixing):
    model = build(mixing=mixing)
    made = explain(copy.deepcopy(model), X, mem_budget="60%", codecs="exact").plans
    path = tmp_path / "plans.json"
    write_json(made, path)
    found, (plan,) = compiled(tmp_path, model, plan=path, codecs="exact")
    assert not searches
    assert plan.choices == made[0].choices and plan.budget == made[0].budget
    for name in ("slices", "held_slices", "saved_share", "relayout"):
        assert getattr(plan, name) == getattr(made[0], name)
    assert plan.audited_peak is not None and plan.audited_peak <= plan.budget
    for one, other in zip(found, gradients(model, model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_every_graph_takes_its_own_plan(tmp_path, searches):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = build(), nn.Conv2d(2, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    made = compiled(tmp_path, Broken(), mem_budget="90%", codecs="exact")[1]
    path = tmp_path / "plans.json"
    write_json(reversed(made), path)
    searches.clear()
    again = compiled(tmp_path, Broken(), plan=path, codecs="exact")[1]
    assert len(made) == 2 and not searches
    assert [plan.choices for plan in again] == [plan.choices for plan in made]
    write_json(made[:1], path)
    with pytest.raises(OptionError, match="all of its 1 plans are taken by other graphs"):
        compiled(tmp_path, Broken(), plan=path, codecs="exact")


def test_a_plan_of_another_graph_is_refused(tmp_path):
    path = tmp_path / "plans.json"
    write_json(explain(build(), X, mem_budget="60%", codecs="quantize:2,bitmask").plans, path)
    with pytest.raises(OptionError, match=r"is not one of this graph: .*shape=.* with the same other options"):
        compiled(tmp_path, build(width=4), plan=path, codecs="quantize:2,bitmask")
    with pytest.raises(OptionError, match=r"these options do not let .* be held as it says: .*codec=quantize bits=2"):
        compiled(tmp_path, build(), plan=path, codecs="exact")


def test_a_plan_over_the_budget_is_refused(tmp_path):
    path = tmp_path / "plans.json"
    made = explain(build(), X, mem_budget="80%", codecs="exact").plans
    write_json(made, path)
    with pytest.raises(BudgetInfeasibleError, match=r"the option plan fixes how everything is held") as error:
        compiled(tmp_path, build(), plan=path, codecs="exact", mem_budget=made[0].predicted_peak // 2)
    compiled(tmp_path, build(), plan=path, codecs="exact", mem_budget=error.value.smallest)


def test_a_plans_own_budget_is_that_of_the_step(tmp_path):
    """What the step takes besides is measured, as under any budget."""
    path, model = tmp_path / "plans.json", build()
    write_json(explain(copy.deepcopy(model), X, mem_budget="80%", codecs="exact").plans, path)
    torch._dynamo.reset()
    step = torch.compile(model, backend="xconv", options={"plan": path, "codecs": "exact", "verify": "warn"})
    with pytest.warns(BudgetExceededWarning, match="a training step took"):
        for _ in range(2):
            y = step(X)
            held = torch.zeros(10**6) + y.sum()
            (y.square().mean() + held.mean()).backward()


WRONG: tuple[dict[str, Any], ...] = (
    {"slices": "two"}, {"slices": 0}, {"slices": 2, "held_slices": 9}, {"saved_share": 0.0},
)  # fmt: skip


def test_bad_plans_and_options_beside_one(tmp_path):
    path = tmp_path / "plans.json"
    with pytest.raises(OptionError, match="no such file"):
        compiled(tmp_path, build(), plan=path)
    with pytest.raises(OptionError, match=r"write the path of a file"):
        compiled(tmp_path, build(), plan=3)
    with pytest.raises(OptionError, match=r"it is a directory"):
        compiled(tmp_path, build(), plan=tmp_path)
    (made,) = explain(build(), X, mem_budget="80%", codecs="exact").plans
    wrong = [json.loads(dataclasses.replace(made, **change).to_json()) for change in WRONG]
    for text in ("{}", "[1]", "[null]", "[[]]", *(json.dumps([row]) for row in wrong)):
        path.write_text(text)
        with pytest.raises(OptionError, match=r"not a file of plans"):
            compiled(tmp_path, build(), plan=path, codecs="exact")
    for name, value in {"slices": 2, "prefer": "exact", "max_noise": 0.1, "max_slowdown": 0.1}.items():
        with pytest.raises(OptionError, match=rf"{name}=.*the option plan fixes it"):
            compiled(tmp_path, build(), plan=path, **{name: value})


def test_what_is_recomputed_from_codes_is_so_again(tmp_path, cache, searches):
    """Recomputed from codes or from exact values: a choice has the same name for both."""
    options = {"max_noise": None, "codecs": "exact,quantize:4", "prefer": "speed"}
    with pytest.raises(BudgetInfeasibleError) as refused:
        compiled(tmp_path, build(), mem_budget=1, **options)
    options["mem_budget"] = refused.value.smallest
    searches.clear()
    _, (plan,) = compiled(tmp_path, build(), **options)
    noisy = [choice for choice in plan.choices if choice.codec == "recompute" and choice.noise]
    assert noisy, "a plan that recomputes from codes"
    _, (again,) = compiled(tmp_path, build(), **options)
    assert len(searches) == 1 and again == plan
