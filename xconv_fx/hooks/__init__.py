"""Every private PyTorch interface that xconv-fx leans on, in one place.

Checked against the versions in `CHECKED`; on another version `require_checked_torch` says so before anything is
compiled, instead of failing somewhere inside a graph.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx

from xconv_fx.errors import UnsupportedTorchError

from .ahead import TracedWithin as TracedWithin
from .ahead import calls_functions as calls_functions
from .ahead import current_call as current_call
from .ahead import more_follows as more_follows
from .ahead import parts_of_graph as parts_of_graph
from .ahead import run_ahead as run_ahead
from .ahead import run_parts as run_parts
from .ahead import storage_of as storage_of
from .aot import ChangedElsewhere as ChangedElsewhere
from .aot import changed_inputs as changed_inputs
from .aot import changes as changes
from .aot import deduplicate as deduplicate
from .aot import draws as draws
from .aot import partition as partition
from .autograd import at_end_of_backward as at_end_of_backward
from .autograd import in_backward as in_backward
from .autograd import nodes_made as nodes_made
from .autograd import nodes_of as nodes_of
from .backward import named_double_backward as named_double_backward
from .backward import repeatable as repeatable
from .dynamo import call_behind as call_behind
from .dynamo import compiling_is_off as compiling_is_off
from .dynamo import gave_up as gave_up
from .dynamo import skip as skip
from .dynamo import specialise as specialise
from .dynamo import watch_calls as watch_calls
from .dynamo import watch_frames as watch_frames
from .fake import trying_fake as trying_fake
from .frames import callers as callers
from .frames import compilation as compilation
from .frames import compile_id as compile_id
from .frames import compiling_code as compiling_code
from .frames import forget as forget
from .frames import goes_on as goes_on
from .frames import while_compiling as while_compiling
from .graphs import cheap_graphs as cheap_graphs
from .indexing import cheap_strides as cheap_strides
from .interception import dispatch_modes as dispatch_modes
from .kernels import Deferred as Deferred
from .releases import early_releases as early_releases

CHECKED = ("2.13.0",)


def __getattr__(name: str) -> Any:
    # Its base class imports Inductor, which eager layers do without.
    if name == "Partitioner":
        from .partitioner import Partitioner

        return Partitioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def require_checked_torch() -> None:
    """Raise `UnsupportedTorchError` unless the installed torch is one that the private hooks were checked on."""
    found = torch.__version__
    if found.split("+")[0] not in CHECKED:
        raise UnsupportedTorchError(
            found, f"=={CHECKED[-1]}", f"private hooks of its compiler were checked on {', '.join(CHECKED)}"
        )


def cpp_compiler() -> str:
    """The command of the C++ compiler that Inductor uses. Raises where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def saved_descriptor(index: int) -> Any:
    """AOTAutograd's descriptor of the forward's `index`-th saved value."""
    from torch._functorch._aot_autograd.descriptors import SavedForBackwardsAOTOutput

    return SavedForBackwardsAOTOutput(index)


def channels_last_convolutions(gm: fx.GraphModule, device: str | None = None) -> bool:
    """Whether Inductor will lay out the 4d activations of this graph channels-last.

    `device` is where the graph will be, if that is not where it was traced.
    """
    from torch._inductor.graph import GraphLowering

    # Inductor asks for oneDNN where all tensors are on the CPU, and decides by the convolutions' channels elsewhere.
    elsewhere = mock.patch.object(torch.backends.mkldnn, "is_available", lambda: False)
    with contextlib.nullcontext() if device is None else elsewhere:
        return GraphLowering.decide_layout_opt(gm, is_inference=False)


def source_hash() -> str:
    """Hash of this package's sources: part of every compile cache key."""
    digest = hashlib.sha256()
    import xconv_fx
    from xconv_fx import cost_model, passes  # type: ignore[attr-defined]

    folders = {Path(xconv_fx.__file__).parent, Path(passes.__file__).parent, Path(cost_model.__file__).parent}
    for folder in sorted(folders):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def ahead_of_time_backward() -> Iterator[None]:
    """Compile the backward together with the forward, and always run our partitioner.

    AOTAutograd compiles a backward lazily, at its first call: too late to raise before a step has run. Its own
    cache would skip the partitioner, and with it the plan; Inductor's cache of generated code stays on.
    """
    import torch._functorch.config as functorch_config

    with functorch_config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
        yield


@contextlib.contextmanager
def generated_code(sink: Callable[[str], None]) -> Iterator[None]:
    """Pass the wrapper code of every graph that Inductor generates (or finds in its cache) to `sink`.

    Called before any kernel is compiled; an exception from `sink` abandons the graph.
    """
    from torch._inductor.graph import GraphLowering

    with mock.patch.object(GraphLowering, "save_output_code", staticmethod(sink)):
        yield


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: dict[str, Any],
    entering: Callable[[fx.GraphModule, Sequence[Any], bool], None],
) -> Callable[..., Any]:
    """Inductor's compilation of a graph under `config`; `entering(gm, inputs, is_backward)` before each half."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner_compile(half: fx.GraphModule, inputs: Sequence[Any], **arguments: Any) -> Any:
        is_backward = bool(arguments.get("is_backward"))
        entering(half, inputs, is_backward)
        code = compile_fx_inner(half, inputs, **arguments)
        return repeatable(code) if is_backward else code

    with named_double_backward():
        compiled = compile_fx(gm, example_inputs, inner_compile=inner_compile, config_patches=config)
    assert callable(compiled)
    return compiled


def compile_call() -> object | None:
    """The `torch.compile` call on whose behalf a backend is running: one object for all graphs of that call."""
    return next((value for value in callers() if isinstance(value, torch._TorchCompileWrapper)), None)


def compiled_module() -> torch.nn.Module | None:
    """The outermost module that is being compiled, or None (a compiled function)."""
    from torch._dynamo.eval_frame import OptimizedModule

    found = [value._orig_mod for value in callers() if isinstance(value, OptimizedModule)]
    return found[-1] if found else None


def parameter_bytes(gm: fx.GraphModule, buffers: bool = False) -> int:
    """Bytes of the parameters (and buffers) among a Dynamo graph's inputs, counted once each."""
    sizes: dict[int, int] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        tensor = _example(node)
        if isinstance(tensor, torch.nn.Parameter) or (buffers and "buffers" in node.name and tensor is not None):
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def examples(gm: fx.GraphModule) -> list[Any]:
    """What Dynamo traced a graph with: its inputs, as far as they are known."""
    return [_example(node) for node in gm.graph.find_nodes(op="placeholder") if "grapharg" in node.meta]


def _example(node: fx.Node, otherwise: Any = None) -> Any:
    """What Dynamo traced an input with, where it is known."""
    return getattr(node.meta.get("grapharg"), "example", otherwise)


def data_inputs(gm: fx.GraphModule) -> list[bool]:
    """Which of a Dynamo graph's inputs are tensors, but neither parameters nor buffers.

    What one part of a graph that DDPOptimizer cut hands to the next is known by its fake value alone.
    """
    examples = [
        (node, _example(node, node.meta.get("example_value"))) for node in gm.graph.find_nodes(op="placeholder")
    ]
    return [
        isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and "buffers" not in node.name
        for node, value in examples
    ]


def lost_change(gm: fx.GraphModule, error: Exception) -> str | None:
    """The input of a Dynamo graph of which a change in place is lost, if this error of its compilation is why.

    Dynamo takes tensors of float64 without dimensions for numbers of Python, and traces such a graph anew; calls of
    methods that change them have no reader, and are then no part of it any more (torch 2.13).
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    if not isinstance(error, TensorifyScalarRestartAnalysis):
        return None
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.dim() == 0:
            methods = [str(user.target) for user in node.users if user.op == "call_method" and user.args[0] is node]
            if any(method.endswith("_") and not method.endswith("__") for method in methods):
                return node.name
    return None


def branches(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph goes one of two ways by a value that it computes."""
    return bool(gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond))


def without_samples(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether all that a Dynamo graph takes besides parameters and buffers is empty, as a batch of no samples is."""
    data = [value for value, is_data in zip(example_inputs, data_inputs(gm), strict=True) if is_data and value.dim()]
    return bool(data) and all(value.numel() == 0 for value in data)


def needs_backward(example_inputs: Sequence[Any]) -> bool:
    """Whether the graph that Dynamo traced will be differentiated."""
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )


def input_bytes(gm: fx.GraphModule, given: bool = False) -> int:
    """Bytes of a Dynamo graph's inputs that are neither parameters nor buffers.

    With `given`, of those alone that are no results of what is differentiated before the graph.
    """
    found = (node.meta.get("val", node.meta.get("example_value")) for node in gm.graph.find_nodes(op="placeholder"))
    values = [value for value in found if isinstance(value, torch.Tensor)]
    every = sum(value.numel() * value.element_size() for value in values if value.is_leaf or not given)
    return max(0, int(every) - parameter_bytes(gm, buffers=True))


@contextlib.contextmanager
def fusion_rules(rules: Any) -> Iterator[None]:
    """Let `rules`, an `InductorChoices`, decide on fusions; None leaves Inductor's own."""
    from torch._inductor.virtualized import V

    with V.set_choices_handler(rules) if rules is not None else contextlib.nullcontext():
        yield
