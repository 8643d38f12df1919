"""Which compilation of which frame Dynamo is at, and what follows the graph that it hands over.

Private parts of PyTorch, read in torch 2.13: `torch._guards.CompileContext`, `torch._dynamo.output_graph.OutputGraph`
(`compile_subgraph_reason`), and `torch._dynamo.backends.distributed.SubmodCompiler`, which hands over the parts of one
graph one after another, under one compile id.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import torch

# Dynamo's number of the frame, and of its compilation.
CompileId = tuple[int | None, int | None]


def callers() -> Iterator[object]:
    """`self` of every method on the Python stack, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_locals:
            yield frame.f_locals["self"]
        frame = frame.f_back


def compile_id() -> CompileId | None:
    """The compilation that is going on; None outside of Dynamo.

    Frames are numbered in the order in which they are first compiled, and keep their number when compiled anew.
    """
    identity = torch._guards.CompileContext.current_compile_id()
    return None if identity is None else (identity.frame_id, identity.frame_compile_id)


def goes_on() -> bool:
    """Whether the results of the graph that is compiled now go on into further code of the model.

    So it is at a graph break, and between the parts into which DDPOptimizer cuts a graph; what is left is a graph whose
    results the compiled function returns.
    """
    from torch._dynamo.backends.distributed import SubmodCompiler
    from torch._dynamo.output_graph import OutputGraph

    for caller in callers():
        if isinstance(caller, SubmodCompiler):
            assert isinstance(caller.module, torch.fx.GraphModule)
            parts = caller.module.graph.find_nodes(op="call_module")
            # Parts that are compiled already have other names.
            if sum(not str(part.target).startswith("compiled_") for part in parts) > 1:
                return True
        if isinstance(caller, OutputGraph):
            return bool(caller.compile_subgraph_reason.graph_break)
    return False
