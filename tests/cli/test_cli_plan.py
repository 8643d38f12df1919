"""`xconv plan` with the real planner behind it: a model file in, a table or an exit code out."""

from __future__ import annotations

import json
import re
import resource

import pytest
import torch

from xconv_fx.cli import main
from xconv_fx.cli.arguments import FAILED, INFEASIBLE, OK
from xconv_fx.plan import Plan
from xconv_fx.plan.report import read_json
from xconv_fx.step.explain import explain

NETS = """
import torch
from torch import nn

class Seen(nn.Module):
    \"\"\"Records the device of what it is run on.\"\"\"
    devices = []
    def forward(self, x):
        self.devices.append(x.device.type)
        return x

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1),
    )

def entropy(output, labels):
    return nn.functional.cross_entropy(output, labels)

def huge():
    return nn.Sequential(
        nn.Conv2d(3, 8192, 3, padding=1), nn.ReLU(), *(nn.Conv2d(8192, 8192, 3, padding=1) for _ in range(4))
    )

def frozen():
    return nn.Conv2d(3, 4, 3).requires_grad_(False)

class Broken(nn.Module):
    \"\"\"Two graphs: the trace breaks between its convolutions.\"\"\"
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
    def forward(self, x):
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x).relu()

class Tokens(nn.Module):
    \"\"\"Takes two arguments, one of them of integers.\"\"\"
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.mix = nn.Conv1d(16, 16, 3, padding=1)
    def forward(self, tokens, scale):
        return self.mix(self.table(tokens).transpose(1, 2)).relu() * scale
"""
IMAGES = ["--input", "2x3x32x32"]


@pytest.fixture(autouse=True)
def project(project_of):
    return project_of("nets", NETS, columns=160)


def plans(capsys, *arguments: str, code: int = OK) -> list[Plan]:
    """The plans that `xconv plan ... --json -` writes."""
    assert main(["plan", *arguments, "--json", "-"]) == code
    return [Plan.from_json(json.dumps(item)) for item in json.loads(capsys.readouterr().out)]


def test_without_a_budget_everything_is_kept(capsys):
    (plan,) = plans(capsys, "nets.py:build", *IMAGES)
    assert plan.budget is None and plan.noise == 0
    assert {choice.codec for choice in plan.choices} == {"keep"}
    assert plan.predicted_peak == plan.baseline_peak and plan.device == "cpu"
    # Every convolution's input but the first, which is the batch itself, is among what the backward reads.
    assert sum(choice.shape == (2, 16, 32, 32) for choice in plan.choices) >= 4


def test_a_budget_is_met_and_the_table_says_how(capsys, project):
    (free,) = plans(capsys, "nets.py:build", *IMAGES)
    budget = free.baseline_peak * 2 // 3
    assert main(["plan", "nets.py:build", *IMAGES, "--budget", str(budget), "--json", "plans.json"]) == OK
    table = capsys.readouterr().out
    (plan,) = read_json(project / "plans.json")
    assert plan.budget == budget and plan.predicted_peak <= budget < plan.baseline_peak
    assert plan.saved_after < plan.saved_before
    assert "layer" in table and "2x16x32x32" in table and "fits" in table
    for choice in plan.choices:
        assert choice.codec in table
    assert re.search(rf"all {len(plan.choices)}\b", table)


def test_only_allowed_codecs_are_used(capsys):
    (plan,) = plans(capsys, "nets.py:build", *IMAGES, "--budget", "75%", "--codecs", "quantize:4,bitmask")
    used = {(choice.codec, choice.bits) for choice in plan.choices}
    assert ("quantize", 4) in used or ("bitmask", None) in used
    assert used <= {("keep", None), ("bitmask", None), ("quantize", 4)}


def test_an_infeasible_budget_exits_with_one_and_names_one_that_works(capsys):
    assert main(["plan", "nets.py:build", *IMAGES, "--budget", "1kB"]) == INFEASIBLE
    error = capsys.readouterr().err
    assert "the smallest feasible budget is" in error and "Traceback" not in error
    (smallest,) = re.findall(r"--budget (\S+)$", error.strip())
    assert main(["plan", "nets.py:build", *IMAGES, "--budget", smallest]) == OK
    assert "fits" in capsys.readouterr().out


def test_a_large_network_is_planned_in_little_memory(capsys):
    """Parameters of 9.7 GB and activations of 1.1 GB each are reserved at most, and never written to."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (plan,) = plans(capsys, "nets.py:huge", "--input", "8x3x64x64")
    assert plan.fixed_bytes > 4 * 8192 * 8192 * 9 * 4
    assert plan.baseline_peak > plan.fixed_bytes + 5 * 8 * 8192 * 64 * 64 * 4
    # In kilobytes on Linux, bytes on macOS; that of one activation would already be more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000


def test_the_plan_is_the_same_with_real_memory(capsys):
    (abstract,) = plans(capsys, "nets.py:build", *IMAGES, "--budget", "70%")
    torch._dynamo.reset()
    (real,) = plans(capsys, "nets.py:build", *IMAGES, "--budget", "70%", "--allocate")
    assert abstract == real


def test_every_graph_of_a_broken_trace_has_a_plan(capsys):
    first, second = plans(capsys, "nets.py:Broken", *IMAGES)
    assert {choice.shape for choice in (*first.choices, *second.choices)} == {(2, 8, 32, 32)}
    # Each counts the parameters of both; the second also its input, which is the larger, and what the first one holds.
    parameters, image, inner = 4 * (8 * 3 * 9 + 8 + 8 * 8 * 9 + 8), 2 * 3 * 32 * 32 * 4, 2 * 8 * 32 * 32 * 4
    assert first.fixed_bytes >= parameters + image
    assert second.fixed_bytes >= parameters + inner + first.saved_after


def test_several_inputs_of_several_types(capsys):
    (plan,) = plans(capsys, "nets.py:Tokens", "--input", "4x20:int64", "--input", "4x16x20")
    assert {choice.shape[0] for choice in plan.choices} == {4}


def test_a_loss_is_planned_with_the_model(capsys):
    """Layers keep their names, and what the loss holds is a residual like every other."""
    (alone,) = plans(capsys, "nets.py:build", *IMAGES)
    loss = ["--loss", "nets.py:entropy", "--label", "2x32x32:int64"]
    (both,) = plans(capsys, "nets.py:build", *IMAGES, *loss)
    names = {choice.layer for choice in alone.choices}
    assert names <= {choice.layer for choice in both.choices}
    # The log-probabilities of 4 classes.
    assert (2, 4, 32, 32) in {choice.shape for choice in both.choices} - {choice.shape for choice in alone.choices}


def test_a_loss_that_fails_is_told_apart_from_the_model(capsys):
    given = ["--loss", "nets.py:entropy", "--label", "2x16x16:int64"]
    assert main(["plan", "nets.py:build", *IMAGES, *given]) == FAILED
    error = capsys.readouterr().err
    assert "--loss nets.py:entropy failed on the output of Sequential --label 2x16x16:int64" in error
    assert "one --label for each further argument" in error


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_are_accepted(capsys, reduction):
    assert plans(capsys, "nets.py:build", *IMAGES, "--loss", reduction)


def test_a_fixed_number_of_probes_by_layer(capsys):
    (plan,) = plans(capsys, "nets.py:build", *IMAGES, "--budget", "90%", "--probes", "4=64")
    assert [choice.probes for choice in plan.choices if choice.codec == "probe"] == [64]
    assert main(["plan", "nets.py:build", *IMAGES, "--budget", "90%", "--probes", "encoder=64"]) == FAILED
    assert "no layer matches" in capsys.readouterr().err


def test_a_wrong_shape_is_told_by_the_layer_that_refuses_it(capsys):
    assert main(["plan", "nets.py:build", "--input", "2x5x32x32"]) == FAILED
    error = capsys.readouterr().err
    assert "failed on --input 2x5x32x32:float32, in 0 (Conv2d(3, 16" in error and "Traceback" not in error


def test_a_network_without_trainable_parameters_is_refused(capsys):
    assert main(["plan", "nets.py:frozen", *IMAGES]) == FAILED
    assert "nothing in it requires a gradient" in capsys.readouterr().err


def test_explain_leaves_the_model_as_it_was():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 1)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explanation = explain(model, torch.randn(2, 3, 16, 16), mem_budget="90%")
    assert len(explanation.plans) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
