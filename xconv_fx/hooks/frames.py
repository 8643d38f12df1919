"""Which compilation of which frame Dynamo is at, and what follows the graph that it hands over.

Private parts of PyTorch, read in torch 2.13: `torch._guards.CompileContext`, `torch._dynamo.output_graph.OutputGraph`
(`compile_subgraph_reason`), and `torch._dynamo.backends.distributed.SubmodCompiler`, which hands over the parts of one
graph one after another, under one compile id; `torch._dynamo.callback`; and the entries of Dynamo's cache of compiled
frames, which Dynamo itself makes invalid as `forget` does when an object dies that their guards know.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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


def compilation() -> object | None:
    """What stands for the compilation that is going on and for no other: numbers begin anew after a reset of Dynamo."""
    return torch._guards.CompileContext.try_get()


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


def compiling_code() -> types.CodeType | None:
    """The code of the frame that Dynamo compiles now; None outside of Dynamo."""
    from torch._dynamo.output_graph import OutputGraph

    graph = next((caller for caller in callers() if isinstance(caller, OutputGraph)), None)
    return None if graph is None or graph.root_tx is None else graph.root_tx.f_code


def forget(compiled: Mapping[CompileId, types.CodeType]) -> None:
    """Let Dynamo compile these frames anew when they are called next.

    What was compiled runs on where it has begun, and backwards of what ran have their own code.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    for code in set(compiled.values()):
        for entry in _debug_get_cache_entry_list(code):
            identity = entry.compile_id
            if identity is not None and (identity.frame_id, identity.frame_compile_id) in compiled:
                invalidate(entry, "xconv-fx plans the step again")


def invalidate(entry: Any, reason: str) -> None:
    """Make an entry of Dynamo's cache one that is never used again; nothing happens where it is that already."""
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    manager = entry.guard_manager
    if getattr(manager, "extra_state", None) is not None:
        manager.extra_state.invalidate(entry, DeletedGuardManagerWrapper(reason))
        manager.cache_entry = manager.extra_state = None


@contextlib.contextmanager
def while_compiling(call: Callable[[bool], None]) -> Iterator[None]:
    """Within, `call(True)` when Dynamo or a lazy backward begins to compile, and `call(False)` when it has."""
    from torch._dynamo.callback import callback_handler

    def start(_: object) -> None:
        call(True)

    def end(_: object) -> None:
        call(False)

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        # `torch._dynamo.reset` takes all of them away.
        if start in callback_handler.start_callbacks:
            callback_handler.remove_start_callback(start)
            callback_handler.remove_end_callback(end)


@contextlib.contextmanager
def any_number_of_sizes() -> Iterator[None]:
    """Within this context Dynamo compiles one piece of code for however many shapes."""
    many = sys.maxsize
    with torch._dynamo.config.patch(recompile_limit=many, accumulated_recompile_limit=many):
        yield
