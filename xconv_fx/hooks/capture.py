"""One trace of AOTAutograd for all compilations of a graph.

AOTAutograd compiles in stages: it runs the forward to see what it returns and changes (`create_aot_state`), traces the
joint graph (`aot_stage1_graph_capture`), and partitions and compiles that (`aot_stage2_compile`). What the first two
find depends on the graph alone. While a `Capture` is in use they run once; later compilations of the same graph start
from copies of what was found.

Private parts of PyTorch, read in torch 2.13: `torch/_functorch/aot_autograd.py` and, of `_aot_autograd/`,
`graph_compile.py` and `schemas.py` (`AOTState`, `AOTGraphCapture`, `ViewAndMutationMeta`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from torch import fx

from .fx import graph_module


@dataclass(frozen=True)
class _Found:
    """What AOTAutograd found: `seen` of the forward, and as it was changed by tracing; the joint graph; its inputs."""

    seen: Any
    metadata: Any
    flat_args: Any
    descriptors: Any
    joint: Any


class Capture:
    """What AOTAutograd traced of one graph."""

    def __init__(self) -> None:
        self._found: _Found | None = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within this context AOTAutograd compiles the graph of this capture, and traces it if it has not yet.

        Graphs of tensor subclasses, and graphs without a backward, are traced every time.
        """
        import torch._functorch.aot_autograd as aot

        look, trace = aot.run_functionalized_fw_and_collect_metadata, aot.aot_stage1_graph_capture
        seen: list[Any] = []

        def collect(function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
            def run(*inputs: Any) -> Any:
                if self._found is not None:
                    return _metadata(self._found.seen)
                found = look(function, **arguments)(*inputs)
                seen[:] = [_metadata(found)]
                return found

            return run

        def stage1(state: Any, function: Callable[..., Any]) -> Any:
            if self._found is None:
                joint = trace(state, function)
                if not state.needs_autograd or joint.maybe_subclass_meta is not None or not seen:
                    return joint
                metadata = _metadata(state.fw_metadata)
                self._found = _Found(seen[0], metadata, state.flat_args, state.flat_args_descs, joint)
            found = self._found
            state.flat_args, state.flat_args_descs = found.flat_args, found.descriptors
            state.fw_metadata = _metadata(found.metadata)
            return replace(
                found.joint,
                wrappers=[copy.copy(wrapper) for wrapper in found.joint.wrappers],
                graph_module=copied(found.joint.graph_module),
            )

        with (
            mock.patch.object(aot, "run_functionalized_fw_and_collect_metadata", collect),
            mock.patch.object(aot, "aot_stage1_graph_capture", stage1),
        ):
            yield


def _metadata(found: Any) -> Any:
    """A copy whose fields, and the lists in them, may be set; the tensors are the same."""
    made = copy.copy(found)
    for name, value in vars(made).items():
        if isinstance(value, list):
            setattr(made, name, list(value))
    return made


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own on the same tensors, to be compiled more than once.

    Dynamo makes what an optimiser updates attributes of its graph: code that was compiled for copies of these tensors
    would leave the user's as they are.
    """
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    results = graph.graph_copy(gm.graph, {})
    graph.output(results).meta = dict(gm.graph.output_node().meta)
    graph.set_codegen(gm.graph._codegen)
    copy_of_it = graph_module(gm, graph)
    copy_of_it.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):  # The body of a checkpoint or another operator that takes a graph.
            setattr(copy_of_it, name, copied(child))
    return copy_of_it
