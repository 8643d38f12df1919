"""Plans on eager layers: what a plan says of a layer's input is what the layer holds, and the rest is said."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import xconv_fx
from xconv_fx import nn as xnn
from xconv_fx.codec_spec import CodecSpec
from xconv_fx.errors import BudgetInfeasibleError, OptionError
from xconv_fx.nn.assignment import ByPlan
from xconv_fx.nn.sketch import Sketch
from xconv_fx.plan import Choice, Plan

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def choice(layer, codec, readers, held=10, **parameters):
    spec = CodecSpec(codec, **parameters)
    return Choice("r", layer, "relu", (4, 8), "float32", (), spec, 100, held, readers=readers)


def plan(*choices, **more):
    return Plan("cpu", None, 10, 5, "mm", 0, choices, **more)


class Branches(nn.Module):
    """One residual that two layers read, normalisation, and a skip connection."""

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.act(self.stem(x))
        return self.last(self.norm(self.left(x) + self.right(x)).relu())


@pytest.fixture(scope="module")
def converted():
    torch._dynamo.reset()
    model, x = Branches(), torch.randn(8, 3, 32, 32)
    result, report = xconv_fx.plan_and_convert(
        model, x, mem_budget="80%", codecs="probe,quantize,bitmask", prefer="speed"
    )
    torch._dynamo.reset()
    return model, result, report, x


def test_layers_hold_what_the_plan_holds(converted):
    _, result, report, _ = converted
    (only,) = report.plans
    read = {layer: choice for choice in only.choices for layer in choice.readers}
    assert {"left", "right", "last"} <= set(read)
    layers = dict(result.named_modules())
    for name, chosen in read.items():
        if chosen.codec in ("keep", "bitmask"):  # The second: bits beside a tensor that is let go of earlier.
            assert type(layers[name]) is nn.Conv2d and report.left[name] == "the plan keeps its input"
        else:
            assert layers[name].probes == chosen.probes and layers[name].bits == (chosen.bits or 32)
    # The first layer reads the model's input, which is there whatever is held.
    assert type(result.stem) is nn.Conv2d and "none of the plan's residuals" in report.left["stem"]
    assert read["left"] is read["right"] and type(result.left) is type(result.right) is xnn.XConv2d
    assert type(result.act) is xnn.BitReLU


def test_less_is_held_and_the_model_computes_the_same(converted, saved_by):
    model, result, _, x = converted
    held, out = saved_by(lambda: result(x))
    before, expected = saved_by(lambda: model(x))
    torch.testing.assert_close(out, expected)
    assert sum(tensor.nbytes for tensor in held) < 0.8 * sum(tensor.nbytes for tensor in before)
    assert type(model.left) is nn.Conv2d


def test_what_eager_code_cannot_do_is_said(converted):
    _, _, report, _ = converted
    assert any("measure the peak" in note for note in report.notes)
    assert not any("slices" in note or "recompute" in note for note in report.notes)
    cannot = ByPlan(
        [
            plan(choice("a", "recompute", ("b",)), choice("c", "quantize", (), bits=4), slices=4),
            plan(choice("c", "recompute", ()), saved_share=0.5),
        ]
    )
    notes = " ".join(cannot.notes)
    for said in ("recomputes, and eager code holds: 2", "holds whole: 1", "in 4 slices", "partitioner recomputes more"):
        assert said in notes
    assert cannot.sketch(["b"]) == "the plan recomputes its input, which needs a compiler"
    assert ByPlan([plan(choice("a", "keep", ("b",)))]).notes == ()


def test_one_setting_for_a_layer_that_is_used_twice():
    few = choice("a", "probe", ("x",), probes=8, kind="fold", means=True, bits=2, held=5)
    many = choice("b", "quantize", ("x", "y"), bits=4, held=20)
    dense = choice("c", "probe", ("z",), probes=8, kind="gaussian")
    given = ByPlan([plan(few, many, dense)])
    assert given.sketch(["x"]) == given.sketch(["y"]) == Sketch.of(bits=4)
    assert given.sketch(["other", "z"]) == Sketch.of(8, "gaussian", means=False)
    assert isinstance(ByPlan([plan(few, choice("d", "keep", ("x",)))]).sketch(["x"]), str)


def test_relus_hold_bits_unless_the_plan_keeps_their_result():
    given = ByPlan(
        [plan(choice("kept", "keep", ("x",)), choice("masked", "bitmask", ()), choice("coded", "quantize", ("y",)))]
    )
    assert given.why_whole(["kept"]) == "the plan keeps its result"
    assert given.why_whole(["masked"]) == given.why_whole(["coded"]) == given.why_whole(["unnamed"]) == ""
    assert ByPlan([plan(choice("kept", "keep", ("x",)))]).why_whole(["unnamed"]) == "the plan keeps its result"


def test_without_a_budget_everything_is_kept():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    converted, report = xconv_fx.plan_and_convert(model, (torch.randn(2, 3, 16, 16),))
    assert not report.converted and [type(layer) for layer in converted] == [type(layer) for layer in model]
    assert set(report.left) == {"0", "1", "2"}


def test_errors_are_those_of_explain():
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 16, 16)
    with pytest.raises(OptionError, match="no such option"):
        xconv_fx.plan_and_convert(model, x, mem_bugdet="1GB")
    with pytest.raises(BudgetInfeasibleError, match="smallest feasible"):
        xconv_fx.plan_and_convert(model, x, mem_budget=1)


def test_readers_survive_json():
    given = plan(choice("a", "quantize", ("b", "c"), bits=4))
    assert Plan.from_json(given.to_json()) == given
    old = given.to_json().replace('"readers": [\n        "b",\n        "c"\n      ],', "")
    assert Plan.from_json(old) == dataclasses.replace(
        given, choices=(dataclasses.replace(given.choices[0], readers=()),)
    )
