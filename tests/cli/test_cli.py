"""The command line: what it hands to the planner, what it prints, and what every mistake is told to type next."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from xconv_fx.cli import main
from xconv_fx.cli.arguments import FAILED, INFEASIBLE, OK
from xconv_fx.codec_spec import CodecSpec
from xconv_fx.errors import BudgetInfeasibleError, UnsupportedModelError, UsageError
from xconv_fx.plan import Choice, Plan
from xconv_fx.plan.report import read_json
from xconv_fx.tools.workload import InputSpec

ROWS = tuple(
    Choice(f"r{i}", f"layer{i}", "relu", (4, 4), "float32", (), CodecSpec("keep"), 64 + i, 64 + i) for i in range(30)
)
PLAN = Plan("cpu", 2000, 5000, 1500, "mm", 0, ROWS)
INPUT = ["--input", "1x3x8x8"]

NET = """
import torch
from sibling import WIDTH

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, WIDTH, 3))
    def forward(self, x):
        return self.stem(x)

build = Net
ready = Net()
number = 3

def make(depth, width, bias=True, *rest, **more): return Net()
def broken(): raise RuntimeError("no weights here")
def reads(): return Net() if torch.ones(1).item() else None
def nothing(): pass
def quits(): raise SystemExit(0)
def _private(): pass
def inputs(size=8): return torch.randn(1, 3, size, size)
def named(name="x"): return {name: torch.randn(1, 3, 8, 8)}
def loss(output, label): return torch.nn.functional.cross_entropy(output.mean((2, 3)), label)
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A directory with a user's files, the current one; imports leave no trace after the test."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "sibling.py").write_text("WIDTH = 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def explain(monkeypatch):
    """A stand-in for the planner that runs the model, records its arguments and returns (or raises) `result`."""
    spy = SimpleNamespace(result=(PLAN,), calls=[])

    def stand_in(model, *inputs, mem_budget=None, **options):
        spy.calls.append((model, inputs, {"mem_budget": mem_budget, **options}))
        if isinstance(spy.result, Exception):
            raise spy.result
        model(*inputs)
        return SimpleNamespace(plans=spy.result)

    module = ModuleType("xconv_fx.step.explain")
    module.explain = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xconv_fx.step.explain", module)
    return spy


def _fails(capsys, *arguments: str, code: int = FAILED) -> str:
    assert main(["plan", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def test_a_plan_is_printed_and_the_model_takes_no_memory(capsys, explain):
    assert main(["plan", "net.py:build", *INPUT, "--budget", "2GB"]) == OK
    assert "layer29" in capsys.readouterr().out
    ((model, inputs, options),) = explain.calls
    assert {item.device.type for item in (*model.parameters(), *inputs)} == {"meta"}
    assert options == {"mem_budget": "2GB"}


def test_every_option_reaches_the_planner(explain):
    given = ["--budget", "60%", "--codecs", "exact,quantize:4", "--probes", "enc.*=8,head=2"]
    given += ["--reserve", "1MB", "--calls", "2", "--loss", "sum"]
    assert main(["plan", "net.py:build", *INPUT, *given]) == OK
    assert explain.calls[0][2] == {
        "mem_budget": "60%",
        "codecs": "exact,quantize:4",
        "probes": {"enc.*": 8, "head": 2},
        "reserve": "1MB",
        "calls": 2,
        "loss": "sum",
    }
    main(["plan", "net.py:build", *INPUT, "--probes", "8"])
    assert explain.calls[1][2] == {"mem_budget": None, "probes": 8}


@pytest.mark.parametrize("target", ["net:build", "net.py:build", "./net.py:Net", "net:ready"])
def test_ways_to_name_a_model(target, explain):
    assert main(["plan", target, *INPUT]) == OK
    assert type(explain.calls[0][0]).__name__ == "Net"


@pytest.mark.parametrize("target", ["net.py:make(2, 3)", "net:make(depth=2, width=3, bias=False)", "net:Net()"])
def test_models_with_arguments(target, explain):
    assert main(["plan", target, *INPUT]) == OK
    assert type(explain.calls[0][0]).__name__ == "Net"


def test_arguments_arrive_as_the_literals_they_are(project, explain):
    made = "    net = torch.nn.Conv2d(3, 4, 3)\n    net.got = args, kw\n    return net\n"
    (project / "echo.py").write_text(f"import torch\ndef build(*args, **kw):\n{made}")
    assert main(["plan", "echo.py:build(-1, 'a:b(c)', norm=\"batch\", sizes=[1, 2], flag=True)", *INPUT]) == OK
    assert explain.calls[0][0].got == ((-1, "a:b(c)"), {"norm": "batch", "sizes": [1, 2], "flag": True})


@pytest.mark.parametrize("source", ["net.py:inputs", "net.py:inputs(size=8)", "net.py:named", "net:named"])
def test_inputs_from_a_callable(source, explain):
    assert main(["plan", "net.py:build", "--input", source]) == OK
    ((_, inputs, _),) = explain.calls
    assert [(tuple(item.shape), item.device.type) for item in inputs] == [((1, 3, 8, 8), "meta")]


def test_a_loss_and_its_labels(explain):
    assert main(["plan", "net.py:build", *INPUT, "--loss", "net.py:loss", "--label", "1:int64"]) == OK
    _, _, options = explain.calls[0]
    assert options["loss"].__name__ == "loss"
    assert [(tuple(label.shape), label.dtype) for label in options["targets"]] == [((1,), torch.int64)]
    target = "torch.nn:CrossEntropyLoss(label_smoothing=0.5)"
    assert main(["plan", "net.py:build", *INPUT, "--loss", target, "--label", "1:int64"]) == OK
    assert explain.calls[1][2]["loss"].label_smoothing == 0.5


def test_model_inputs_and_loss_share_one_file(project, explain):
    (project / "once.py").write_text(
        "import torch\nfrom pathlib import Path\n"
        "Path('runs').write_text((Path('runs').read_text() if Path('runs').exists() else '') + 'x')\n"
        "build = lambda: torch.nn.Conv2d(3, 4, 3)\ninputs = lambda: torch.randn(1, 3, 8, 8)\nloss = lambda y: y.sum()\n"
    )
    assert main(["plan", "once.py:build", "--input", "once.py:inputs", "--loss", "once.py:loss"]) == OK
    assert (project / "runs").read_text() == "x"


def test_a_module_in_a_package(project):
    (project / "zoo").mkdir()
    (project / "zoo" / "models.py").write_text("import torch\nclass Zoo:\n    build = lambda: torch.nn.Identity()\n")
    assert main(["plan", "zoo.models:Zoo.build", *INPUT]) == OK


def test_allocate_builds_with_real_memory(capsys, explain):
    assert "--allocate" in _fails(capsys, "net.py:reads", *INPUT)
    assert main(["plan", "net.py:reads", *INPUT, "--allocate"]) == OK
    model, inputs, _ = explain.calls[0]
    assert {item.device.type for item in (*model.parameters(), *inputs)} == {"cpu"}


def test_a_users_file_may_be_called_like_a_module_that_is_loaded(project):
    (project / "torch.py").write_text(NET.replace("import torch\nfrom sibling import WIDTH", "from net import *"))
    before = sys.modules["torch"]
    main(["plan", "torch.py:build", *INPUT])
    assert sys.modules["torch"] is before


def test_limit(capsys):
    for given, more in (([], "5"), (["--limit", "7"], "23")):
        main(["plan", "net.py:build", *INPUT, *given])
        assert f"and {more} more" in capsys.readouterr().out
    main(["plan", "net.py:build", *INPUT, "--limit", "0"])
    assert "more" not in capsys.readouterr().out.partition("held ")[0]


def test_several_graphs_are_numbered(capsys, explain):
    explain.result = (PLAN, PLAN)
    main(["plan", "net.py:build", *INPUT])
    out = capsys.readouterr().out
    assert "graph 1 of 2" in out and "graph 2 of 2" in out


def test_json_to_a_file_and_to_standard_output(capsys, project):
    assert main(["plan", "net.py:build", *INPUT, "--json", "plans.json"]) == OK
    assert read_json(project / "plans.json") == (PLAN,)
    assert "layer29" in capsys.readouterr().out
    assert main(["plan", "net.py:build", *INPUT, "--json", "-"]) == OK
    assert json.loads(capsys.readouterr().out)[0]["budget"] == 2000


def test_an_infeasible_budget_has_its_own_exit_code(capsys, explain):
    explain.result = BudgetInfeasibleError(10**9, 3_105_000_000, [("encoder.conv", 2 * 10**9)])
    error = _fails(capsys, "net.py:build", *INPUT, "--budget", "1GB", code=INFEASIBLE)
    assert "encoder.conv" in error and "--budget 3.11GB" in error


def test_a_plan_above_its_budget_fails_too(capsys, explain):
    explain.result = (Plan("cpu", 1000, 5000, 1500, "mm", 0, ROWS),)
    assert main(["plan", "net.py:build", *INPUT]) == INFEASIBLE
    assert "missed by 500 B" in capsys.readouterr().out


MISTAKES = [
    (["net.py:build", *INPUT, "--buget", "2GB"], ["unknown argument '--buget'", "'--budget'"]),
    (["net.py:build", *INPUT, "--budget"], ["--budget", "xconv plan --help"]),
    (["net.py:build"], ["required: --input", "xconv plan --help"]),
    (["net.py:build", *INPUT, "--budget", "8 bananas"], ["--budget '8 bananas'", "'8GB'"]),
    (["net.py:build", *INPUT, "--budget", "150%"], ["--budget '150%'", "'60%'"]),
    (["net.py:build", *INPUT, "--codecs", "quantise"], ["--codecs 'quantise'", "did you mean 'quantize'"]),
    (["net.py:build", *INPUT, "--probes", "many"], ["--probes 'many'", "--probes 8"]),
    (["net.py:build", *INPUT, "--probes", "a=0"], ["--probes 'a=0'", "not a positive int", "--probes 8"]),
    (["net.py:build", *INPUT, "--reserve", "-1"], ["--reserve"]),
    (["net.py:build", *INPUT, "--limit", "x"], ["--limit 'x'", "--limit 25"]),
    (["net.py:build", *INPUT, "--json", "missing/p.json"], ["--json 'missing/p.json'", "create it first"]),
    (["net.py:build", *INPUT, "--json", "."], ["--json", "a directory"]),
    (["net.py:build", "--input", "1x3xA"], ["--input '1x3xA'", "4x1x96x96x96"]),
    (["net.py:build", "--input", "0x3"], ["positive sizes"]),
    (["net.py:build", "--input", "1x3:flat32"], ["no dtype 'flat32'", "did you mean 'float32'"]),
    (["net.py:build", *INPUT, *INPUT], ["2 --input given", "forward(x)"]),
    (["net.py:build", "--input", "1x5x8x8"], ["Net failed on --input 1x5x8x8:float32, in stem.0 (Conv2d(3, 4"]),
    (["nets.py:build", *INPUT], ["no such file: nets.py", "did you mean 'net.py'"]),
    (["lost/net.py:build", *INPUT], ["no such file: lost/net.py", "FILE.py:callable"]),
    (["net.py", *INPUT], ["'net.py' names no callable", "net.py:build"]),
    (["net.py:", *INPUT], ["names no callable", "net.py:build"]),
    ([":build", *INPUT], ["names no file", "FILE.py:callable"]),
    (["nett.model:build", *INPUT], ["no module named 'nett.model'", "nett/model.py:callable"]),
    (["net.py:biuld", *INPUT], ["net.py has no 'biuld'", "did you mean 'build'", "callables there: Net, build"]),
    (["net.py:number", *INPUT], ["not callable but a int", "callables there"]),
    (["net.py:make(3)", *INPUT], ["net.py:make(3) cannot be called: missing a required argument: 'width'"]),
    (["net.py:make(dept=3, width=2)", *INPUT], ["missing a required argument: 'depth'", "make(depth=..., width=2)"]),
    (["net.py:build(width=2)", *INPUT], ["unexpected keyword argument 'width'", "write 'net.py:build()'"]),
    (["net.py:make(width=WIDE)", *INPUT], ["(width=WIDE) are not literals", "'net.py:build(width=32, norm"]),
    (["net.py:make(f(1), 2)", *INPUT], ["are not literals"]),
    (["net.py:make(1)(2)", *INPUT], ["are not literals"]),
    (["net.py:make(**{'depth': 1})", *INPUT], ["are not literals"]),
    (["net.py:make(1", *INPUT], ["names no callable", "net.py:build"]),
    (["net.py:ready()", *INPUT], ["net.py:ready is a model already", "try:   net.py:ready"]),
    (["net.py:build", "--input", "net.py:inptus"], ["net.py has no 'inptus'", "did you mean 'inputs'"]),
    (
        ["net.py:build", "--input", "net.py:inputs", *INPUT],
        ["'net.py:inputs' and 1 more given", "tuple or dict"],
    ),
    (["net.py:build", "--input", "net.py:named('y')"], ["1 --input given: y, but", "forward(x)"]),
    (["net.py:build", "--input", "net.py:broken"], ["net.py:broken failed (line 17): RuntimeError: no weights here"]),
    (["net.py:build", *INPUT, "--loss", "meen"], ["no loss 'meen'", "did you mean 'mean'", "FILE.py:callable"]),
    (["net.py:build", *INPUT, "--loss", "net.py:los"], ["net.py has no 'los'"]),
    (["net.py:build", *INPUT, "--loss", "net.py:number"], ["not callable but a int"]),
    (["net.py:build", *INPUT, "--label", "8:int64"], ["--label given, but no loss", "--loss FILE.py:callable"]),
    (["net.py:build", *INPUT, "--loss", "net.py:loss", "--label", "8:label"], ["--label '8:label': no dtype 'label'"]),
    (["net.py:make", *INPUT], ["needs arguments: depth, width", "net.py:make(depth=..., width=...)"]),
    (["net.py:broken", *INPUT], ["net.py:broken failed (line 17): RuntimeError: no weights here", "--debug"]),
    (["net.py:quits", *INPUT], ["SystemExit"]),
    (["net.py:nothing", *INPUT], ["returned NoneType", "return the model"]),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES, ids=lambda value: " ".join(value)[-40:])
def test_mistakes_are_told_what_to_type_next(capsys, arguments, told):
    error = _fails(capsys, *arguments)
    assert error.startswith("error: ")
    for text in told:
        assert text in error


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import os\nimport no_such_package\n", ["(line 2)", "ModuleNotFoundError", "provides 'no_such_package'"]),
        ("def f(:\n", ["(line 1)", "SyntaxError"]),
        ("x = 1\nraise SystemExit(3)\n", ["(line 2)", "SystemExit: 3", "__name__ == '__main__'"]),
        ("1 / 0", ["(line 1)", "ZeroDivisionError: division by zero"]),
    ],
)
@pytest.mark.parametrize("target", ["user.py:build", "user:build"])
def test_errors_in_the_users_file(capsys, project, source, told, target):
    (project / "user.py").write_text(source)
    error = _fails(capsys, target, *INPUT)
    assert "cannot be imported" in error
    for text in told:
        assert text in error


def test_planner_errors_are_passed_on(capsys, explain):
    explain.result = UnsupportedModelError("decoder", "a view of a saved output", "return a copy")
    assert "decoder: a view of a saved output. What would work: return a copy" in _fails(capsys, "net.py:build", *INPUT)
    explain.result = KeyError("in the planner")
    assert "Net failed on --input 1x3x8x8:float32: KeyError: 'in the planner'" in _fails(capsys, "net:build", *INPUT)


def test_debug_shows_the_traceback(capsys):
    assert main(["plan", "net.py:broken", *INPUT, "--debug"]) == FAILED
    error = capsys.readouterr().err
    assert "Traceback" in error and "no weights here" in error and "error: net.py:broken failed" in error


def test_commands_are_named_when_missing_or_wrong(capsys):
    assert main([]) == FAILED
    assert "xconv --help" in capsys.readouterr().err
    assert main(["pla"]) == FAILED
    assert "plan" in capsys.readouterr().err


def test_help_documents_the_exit_codes(capsys):
    for arguments in (["--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
        assert "1 the budget cannot be met" in " ".join(capsys.readouterr().out.split())


def test_help_does_not_wait_for_torch():
    code = "import sys; from xconv_fx.cli import main; main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("4x1x96x96x96", (4, 1, 96, 96, 96), torch.float32),
        ("2x77:int64", (2, 77), torch.int64),
        ("8:bf16", (8,), torch.bfloat16),
        ("2X3:Half", (2, 3), torch.float16),
        ("2:long", (2,), torch.int64),
    ],
)
def test_inputs(text, shape, dtype):
    tensor = InputSpec.parse(text).zeros("meta")
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)


@pytest.mark.parametrize("text", ["", "x", "1x", "x3", "1,3", "1xx3", "-1x3", "1.5x3", "1x3:", "1x3:complex64"])
def test_malformed_inputs(text):
    with pytest.raises(UsageError, match="--input"):
        InputSpec.parse(text)
