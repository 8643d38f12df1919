"""Inductor: its settings, its compilation of a graph, and the code that it generates.

Private parts of PyTorch, read in torch 2.13: `torch/_inductor/compile_fx.py`, `GraphLowering` of `graph.py`, `config`,
and of AOTAutograd the settings and the descriptor of a saved value. What needs Inductor imports it when it is called:
eager layers do without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx

from .backward import named_double_backward, repeatable
from .no_ops import own_metadata
from .saved_views import views_of_inputs, with_versions


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
        views = {} if is_backward else views_of_inputs(half)
        code = compile_fx_inner(half, inputs, **arguments)
        if is_backward:
            return repeatable(code)
        return with_versions(code, views) if views else code

    with named_double_backward(), own_metadata():
        compiled = compile_fx(gm, example_inputs, inner_compile=inner_compile, config_patches=config)
    assert callable(compiled)
    return compiled


@contextlib.contextmanager
def fusion_rules(rules: Any) -> Iterator[None]:
    """Let `rules`, an `InductorChoices`, decide on fusions; None leaves Inductor's own."""
    from torch._inductor.virtualized import V

    with V.set_choices_handler(rules) if rules is not None else contextlib.nullcontext():
        yield


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions that Inductor has AOTAutograd trace with."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def settings_of(mode: str | None) -> dict[str, Any]:
    """Inductor's settings of a mode of `torch.compile`."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode)


def setting(name: str) -> Any:
    """The value that a setting of Inductor has now."""
    from torch._inductor import config

    return getattr(config, name)


def known_settings() -> dict[str, Any]:
    """All settings of Inductor, by name, with the type that is declared for each."""
    from torch._inductor import config

    return {name: config.get_type(name) for name in config.get_config_copy()}  # type: ignore[attr-defined]


def compiler_settings() -> str:
    """What stands for the version of torch and the settings of its compiler, as they are now."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    return f"{torch.__version__} {_hash_of(config)} {_hash_of(functorch_config)}"


def _hash_of(config: Any) -> str:
    return str(config.get_hash().hex())


def cache_folder() -> str:
    """Where Inductor keeps compiled kernels unless it is told otherwise."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()
