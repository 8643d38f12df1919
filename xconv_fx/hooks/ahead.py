"""Run a compiled module ahead of time, to see all graphs of a step while the first one is being compiled.

Dynamo compiles graph after graph, and runs each before it sees the next. `run_ahead` has another Dynamo trace the
whole module inside the first graph's compilation: a copy of the module, without memory, on fakes of the call's
arguments. Nothing of that is left behind: random states, counters, what Dynamo has compiled, and what the model's code
prints are put back or taken away.

Private parts of PyTorch, read in torch 2.13: `torch._guards.tracing` and `compile_context`, which an inner compilation
replaces; `OptimizedModule`; and Dynamo's `counters`.

Known gaps: what the model's own Python code changes outside of the module, a global list that it appends to, is changed
once more. So a module with hooks that are functions, whose purpose this often is, is not run ahead.
"""

from __future__ import annotations

import contextlib
import copy
import io
import operator
import os
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake

from .compiled_apart import compiling_apart
from .frames import compiling_code, goes_on

# Variants of one piece of code that Dynamo traces before it gives up.
MANY = 1 << 20

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Call:
    """The call of a compiled module that is going on."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def current_call() -> Call | None:
    """The outermost call of a compiled module on the stack; None in a compiled function."""
    from torch._dynamo.eval_frame import OptimizedModule

    found = None
    for frame in _frames():
        self = frame.f_locals.get("self")
        if isinstance(self, OptimizedModule) and frame.f_code is OptimizedModule.__call__.__code__:
            found = Call(self._orig_mod, tuple(frame.f_locals["args"]), dict(frame.f_locals["kwargs"]))
    return found


def _frames() -> Iterator[types.FrameType]:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def more_follows(module: nn.Module) -> bool:
    """Whether the step has, or may have, further graphs than the one that is compiled now.

    It may where Dynamo does not compile the module's own forward, but code that this calls.
    """
    code = compiling_code()
    if goes_on() or code is None:
        return goes_on()
    own = getattr(type(module).forward, "__code__", None)
    return code is not own and not code.co_filename.startswith(os.path.dirname(torch.__file__))


def calls_functions(module: nn.Module) -> bool:
    """Whether calls of the module or of one of its layers call functions of the user, as hooks."""
    hooks = (
        hook
        for layer in module.modules()
        for hook in (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    )
    return any(isinstance(hook, (types.FunctionType, types.MethodType)) for hook in hooks)


def run_ahead(function: Callable[..., Any], args: Any, kwargs: Any, backend: Backend) -> Any:
    """What the function returns when its graphs are handed to `backend`. For fake arguments.

    What Dynamo compiles for it counts in no limit of recompilations but its own.
    """
    with contextlib.ExitStack() as stack:
        for entered in (torch._guards.tracing(None), torch._guards.compile_context(None), _unnoticed()):
            stack.enter_context(entered)
        patched = {"recompile_limit": MANY, "accumulated_recompile_limit": MANY, "suppress_errors": False}
        stack.enter_context(torch._dynamo.config.patch(patched))  # type: ignore[no-untyped-call]
        compiled = stack.enter_context(compiling_apart())(
            function, dynamic=False, backend=lambda gm, example_inputs: backend(gm, example_inputs)
        )
        return compiled(*args, **kwargs)


def parts_of_graph() -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    """The graph of which DDPOptimizer compiles the first part now, as calls of its parts, and what it is run on."""
    from torch._dynamo.backends.distributed import SubmodCompiler

    for frame in _frames():
        compiler = frame.f_locals.get("self")
        if isinstance(compiler, SubmodCompiler) and frame.f_code is fx.Interpreter.run.__code__:
            module = compiler.module
            assert isinstance(module, fx.GraphModule)
            parts = module.graph.find_nodes(op="call_module")
            if any(str(part.target).startswith("compiled_") for part in parts):
                return None
            return module, tuple(frame.f_locals["args"])
    return None


def run_parts(module: fx.GraphModule, args: Any, backend: Backend) -> Any:
    """What a graph returns that is made of calls of parts, which are handed to `backend`. Nothing of it is computed."""
    from torch._dynamo.utils import to_fake_tensor

    mode = torch._guards.TracingContext.get().fake_mode
    assert mode is not None
    faked = (to_fake_tensor(arg, mode) if isinstance(arg, Tensor) and not is_fake(arg) else arg for arg in args)
    return _Parts(module, backend).run(*faked)


class _Parts(fx.Interpreter):
    """Runs a graph's parts as `backend` compiles them, with a tuple of results each, as DDPOptimizer does."""

    def __init__(self, module: fx.GraphModule, backend: Backend) -> None:
        super().__init__(module)
        self.backend = backend

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        part = self.fetch_attr(target)
        graph = copy.deepcopy(part.graph)
        output = graph.output_node()
        if not isinstance(output.args[0], tuple):
            output.args = (output.args,)
        results = self.backend(fx.GraphModule(part, graph), list(args))(*args)
        # The part that is compiled now returns a tuple already.
        (call,) = self.graph.find_nodes(op="call_module", target=target)
        alone = any(user.target is not operator.getitem for user in call.users)
        return results[0] if alone else results


class TracedWithin:
    """The compilation that is going on, to compile its graph once more after it has ended."""

    def __init__(self) -> None:
        context = torch._guards.TracingContext.try_get()
        # DDPOptimizer counts in its context what is compiled there.
        if context is not None and context.ddp_optimizer_ctx is not None:
            context = torch._guards.TracingContext(context.fake_mode)
        self.context = context

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """What is compiled inside is compiled as part of that compilation."""
        with torch._guards.tracing(self.context), warnings.catch_warnings():
            # Its inputs are asked for their gradients; Dynamo hides this itself.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            yield


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """What happens inside leaves no trace: random states, Dynamo's counters, output and warnings."""
    from torch._dynamo.utils import counters

    known = {name: copy.copy(counter) for name, counter in counters.items()}
    states = random.getstate(), torch.get_rng_state(), _numpy_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        counters.clear()
        counters.update(known)
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        _set_numpy_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _numpy_state() -> Any:
    import numpy as np

    return np.random.get_state()


def _set_numpy_state(state: Any) -> None:
    import numpy as np

    np.random.set_state(state)


def storage_of(value: Any) -> int | None:
    """Which storage a tensor has: a number that is its own while it is alive."""
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
