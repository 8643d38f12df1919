"""What the package needs of torch's private parts is read off its sources, and missed by name."""

from __future__ import annotations

import ast

import pytest
import torch
import torch._functorch.aot_autograd as aot
from torch._inductor.codecache import PyCodeCache

from xconv_fx.hooks import private_parts
from xconv_fx.hooks.private_parts import needed, probe
from xconv_fx.hooks.version import TESTED, minor

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


RECORDED = private_parts.signatures(torch.__version__).stem == ".".join(map(str, minor(torch.__version__)))


def named(source):
    return {private.path for private in private_parts._Names("some.py").of(ast.parse(source))}


def test_the_installed_torch_has_all():
    assert probe() == ()


def test_what_the_package_itself_replaces_counts_as_it_was():
    from xconv_fx.step import backend

    assert backend.xconv and probe() == ()


@pytest.mark.parametrize(
    "path",
    [
        "torch._inductor.compile_fx.compile_fx",  # imported within a function
        "torch._functorch.aot_autograd.aot_stage1_graph_capture",  # replaced
        "torch._inductor.codegen.cpp.stride_at_vec_range",
        "torch._functorch.config.patch",  # an attribute of a module
        "torch._inductor.lowering.register_lowering",  # of the lowerings
    ],
)
def test_what_is_needed(path):
    assert path in {private.path for private in needed()}


@pytest.mark.parametrize(("version", "asks"), [("2.12.1+cu130", True), ("2.13.0", False), ("2.99.0", False)])
def test_what_an_old_torch_alone_needs_is_asked_of_no_other(monkeypatch, version, asks):
    monkeypatch.setattr(torch, "__version__", version)
    assert ("torch._dynamo.convert_frame.input_codes" in {private.path for private in needed()}) == asks


def test_names_are_followed_to_what_they_stand_for():
    assert named("import torch._a.b as c\nc.d.e(c.f)") == {"torch._a.b", "torch._a.b.d.e", "torch._a.b.f"}
    assert named("from torch._a import b as c\nmock.patch.object(c, 'd', 1)") == {"torch._a.b", "torch._a.b.d"}
    assert named("import torch\ntorch._a.b()\ntorch.nn.Linear(1, 1)") == {"torch._a.b"}
    assert named("from torch.fx import graph\nmock.patch.object(graph, 'tree', 1)") == {"torch.fx.graph.tree"}


def test_what_is_done_without_is_not_needed():
    assert not named("try:\n    from torch._a import b\nexcept ImportError:\n    b = None")
    assert named("try:\n    from torch._a import b\nexcept ValueError:\n    b = None") == {"torch._a.b"}


def test_what_is_gone_is_named_with_its_user(monkeypatch):
    monkeypatch.delattr(PyCodeCache, "load_by_key_path")
    (fault,) = probe()
    assert str(fault) == "hooks/kernels.py: torch._inductor.codecache.PyCodeCache.load_by_key_path is not there"


def test_a_parameter_that_is_gone(monkeypatch):
    monkeypatch.setattr(aot, "aot_stage1_graph_capture", lambda aot_state: None)
    (fault,) = probe()
    assert fault.private.name == "aot_stage1_graph_capture" and "has no parameter" in fault.reason


def test_a_parameter_that_must_be_given(monkeypatch):
    trace = aot.aot_stage1_graph_capture
    monkeypatch.setattr(aot, "aot_stage1_graph_capture", lambda aot_state, orig_flat_fn, more: trace)
    (fault,) = probe()
    assert fault.reason == "must be given more"
    monkeypatch.setattr(aot, "aot_stage1_graph_capture", lambda aot_state, orig_flat_fn, more=1: trace)
    assert probe() == ()


@pytest.mark.skipif(not RECORDED, reason="no signatures are recorded of this version")
def test_signatures_are_recorded_of_all(monkeypatch, tmp_path):
    """`python -c "from xconv_fx.hooks import private_parts; private_parts.write_signatures()"` renews the file."""
    recorded = private_parts.signatures(torch.__version__)
    monkeypatch.setattr(private_parts, "_SIGNATURES", tmp_path)
    private_parts.write_signatures()
    assert (tmp_path / recorded.name).read_text() == recorded.read_text()


def test_every_tested_version_has_its_signatures():
    assert {file.stem for file in private_parts._SIGNATURES.iterdir()} >= set(TESTED)


@pytest.mark.parametrize(
    ("version", "held_against"),
    [("2.13.1+cu130", "2.13"), ("2.10.0a0+git1", "2.9"), ("2.11.0", "2.9"), ("3.0", "2.13"), ("2.8.0", "2.9")],
)
def test_a_torch_is_held_against_the_last_before_it(monkeypatch, tmp_path, version, held_against):
    for known in ("2.9", "2.12", "2.13"):
        (tmp_path / f"{known}.json").write_text("{}")
    monkeypatch.setattr(private_parts, "_SIGNATURES", tmp_path)
    assert private_parts.signatures(version).stem == held_against
