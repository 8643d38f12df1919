"""The private interfaces that the backend leans on, where they can be tried without compiling."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from xconv_fx import hooks

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

aten = torch.ops.aten


def test_deduplication():
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = (graph.call_function(aten.sin.default, (x,)) for _ in range(2))
    graph.call_function(aten.cos.default, (x,))
    graph.output((graph.call_function(aten.add.Tensor, (first, second)),))
    gm = fx.GraphModule(nn.Module(), graph)
    hooks.deduplicate(gm)
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [aten.sin.default, aten.add.Tensor]
    value = torch.randn(3)
    assert torch.equal(gm(value)[0], 2 * value.sin())


def test_a_partitioner_stands_for_its_key():
    partitioner = hooks.Partitioner(lambda gm, inputs, **arguments: (gm, inputs, arguments), "key")
    assert partitioner("graph", [1], num_fwd_outputs=2) == ("graph", [1], {"num_fwd_outputs": 2})
    assert partitioner.uuid() == "key"
    # Inductor pickles its configuration into cache keys; the function inside cannot be pickled.
    assert pickle.loads(pickle.dumps(partitioner)) == "key"


def test_eager_layers_do_without_inductor():
    code = "import sys, xconv_fx.nn, xconv_fx.hooks; assert not {'torch._inductor', 'sympy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_are_loaded_when_they_are_wanted(monkeypatch, tmp_path):
    from torch._inductor.codecache import PyCodeCache

    loaded = []

    def load(key, path, *args, **kwargs):
        loaded.append(path)
        return types.SimpleNamespace(call=lambda arguments: [path, *arguments])

    paths = [str(tmp_path / name) for name in ("one", "two")]
    for path in paths:
        Path(path).write_text("")
    monkeypatch.setattr(PyCodeCache, "load_by_key_path", load)
    deferred = hooks.Deferred()
    with deferred.collect():
        modules = [PyCodeCache.load_by_key_path("key", path, attrs={}) for path in paths]
    assert not loaded and [module.__file__ for module in modules] == paths
    deferred.load({})
    assert loaded == paths
    assert modules[1].call([3]) == [paths[1], 3]
    assert PyCodeCache.load_by_key_path is load


def test_generated_code_goes_to_the_sink_and_nowhere_else_after():
    from torch._inductor.graph import GraphLowering

    seen = []
    before = GraphLowering.save_output_code
    with hooks.generated_code(seen.append):
        GraphLowering.save_output_code("code")
    assert seen == ["code"] and GraphLowering.save_output_code is before


def test_frames_and_callers():
    """Inside a backend: the `torch.compile` call, the module, the number of the frame and of its compilation."""
    found = []

    def backend(gm, example_inputs):
        found.append(
            (
                hooks.compile_call(),
                hooks.compiled_module(),
                hooks.compile_id(),
                hooks.parameter_bytes(gm),
                hooks.parameter_bytes(gm, buffers=True),
            )
        )
        return gm

    assert (hooks.compile_call(), hooks.compiled_module(), hooks.compile_id()) == (None, None, None)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    compiled(torch.randn(3, 4))
    compiled(torch.randn(5, 4))  # Compiled again: the same frame of the same call.
    (call, module, first, parameters, buffers), *again = found
    assert isinstance(call, torch._TorchCompileWrapper) and module is model and first is not None
    assert hooks.compiling_code() is None and not hooks.goes_on()
    assert parameters == (16 + 4 + 4 + 4) * 4
    assert buffers == parameters + (4 + 4) * 4 + 8
    assert len(again) == 1 and again[0][:3] == (call, model, (first[0], first[1] + 1))


def test_channels_last_is_inductors_decision():
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph, mode = fx.Graph(), FakeTensorMode()
    operands = [graph.placeholder("x"), graph.placeholder("w")]
    geometry = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    with mode:
        values = torch.empty(2, 8, 16, 16), torch.empty(8, 8, 3, 3)
        result = aten.convolution.default(*values, *geometry)
    for operand, value in zip(operands, values, strict=True):
        operand.meta["val"] = value
    graph.output((operands[0],))
    gm = fx.GraphModule(nn.Module(), graph)
    assert not hooks.channels_last_convolutions(gm)
    with gm.graph.inserting_before(gm.graph.output_node()):
        x, weight = gm.graph.find_nodes(op="placeholder")
        node = gm.graph.call_function(aten.convolution.default, (x, weight, *geometry))
    node.meta["val"] = result
    gm.graph.output_node().args = ((node,),)
    assert hooks.channels_last_convolutions(gm)


def test_what_a_part_of_a_cut_graph_hands_on_is_data() -> None:
    """DDPOptimizer's later graphs read results of earlier ones, which Dynamo knows nothing of: they hold samples."""
    graph = fx.Graph()
    graph.placeholder("relu").meta["example_value"] = torch.empty(4, 3)
    graph.placeholder("size").meta["example_value"] = 3
    graph.output(())
    assert hooks.data_inputs(fx.GraphModule({}, graph)) == [True, False]
