"""Dynamo: the functions that `torch.compile` makes, the frames it gives up, and the sizes it made dynamic.

Private parts of PyTorch, read in torch 2.13: `torch/_dynamo/eval_frame.py` (`OptimizeContext`, which makes what a user
calls), `torch/_dynamo/convert_frame.py` (`ConvertFrameAssert`, which compiles a frame or says why not), and
`torch/fx/experimental/symbolic_shapes.py`. The first two are wrapped for good when this backend is first looked up.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from xconv_fx.errors import UnsupportedModelError

Compiled = Callable[..., Any]
# Characters that are quoted of a reason.
LONGEST = 240
# Reasons for which Dynamo leaves a frame alone that has nothing to compile.
_NOTHING_THERE = ("already Dynamo-generated", "no tensor-related", "__setattr__", "__init__", "exec()", "namedtuple")


def watch_calls(backend: Callable[..., Any], wrap: Callable[[Any, Compiled], Compiled]) -> None:
    """Have `wrap(call, compiled)` called in the place of every function that `torch.compile` makes with this backend.

    `call` is the object that `compile_call` finds.
    """
    from torch._dynamo.eval_frame import OptimizeContext

    make = OptimizeContext.__call__

    @functools.wraps(make)
    def __call__(self: Any, function: Any) -> Any:
        compiled = make(self, function)
        call = call_of(self)
        if call is None or not isinstance(compiled, types.FunctionType) or _backend(call) is not backend:
            return compiled
        watching: Any = wrap(call, compiled)
        skip(watching)
        watched: Any = functools.wraps(compiled)(watching)
        watched._torchdynamo_wrapper_id = id(watched)
        watched._xconv_call = call
        return watched

    OptimizeContext.__call__ = __call__  # type: ignore[assignment, method-assign]


def call_of(context: Any) -> Any:
    """The `torch.compile` call behind the `dynamo_ctx` of a compiled module; None if that is not what it is."""
    from torch._dynamo.eval_frame import innermost_backend

    callback = getattr(context, "callback", None)
    backend = innermost_backend(callback) if callable(callback) else None
    return backend if isinstance(backend, torch._TorchCompileWrapper) else None


def call_behind(compiled: Any) -> Any:
    """The `torch.compile` call that made a compiled module or function, or one that is part of a module; else None."""
    if not isinstance(compiled, torch.nn.Module):
        return getattr(compiled, "_xconv_call", None)
    for module in compiled.modules():
        within = getattr(module, "_compiled_call_impl", None)
        call = call_of(module.__dict__.get("dynamo_ctx")) or getattr(within, "_xconv_call", None)
        if call is not None:
            return call
    return None


def owner_of(compiled: Any) -> Any:
    """The object whose method a function is that `torch.compile` made; None where it is no method's."""
    return getattr(getattr(compiled, "_torchdynamo_orig_callable", None), "__self__", None)


def _backend(call: Any) -> Any:
    function = call.compiler_fn
    return function.func if isinstance(function, functools.partial) else function


def watch_frames(note: Callable[[str | None], None]) -> None:
    """Have `note` called with None for every frame that Dynamo looks at, and with each reason not to compile all of it.

    Reasons begin with the place in the code.
    """
    from torch._dynamo.convert_frame import ConvertFrameAssert
    from torch._dynamo.utils import graph_break_reasons

    convert = ConvertFrameAssert.__call__

    @functools.wraps(convert)
    def __call__(self: Any, frame: Any, *arguments: Any, **keywords: Any) -> Any:
        known = len(graph_break_reasons)
        note(None)
        try:
            result = convert(self, frame, *arguments, **keywords)
            # torch 2.12 has a reason only where it raises an error.
            why = getattr(result, "skip_reason", None) if result.guarded_code is None else None
            if why and not any(some in why for some in _NOTHING_THERE):
                note(f"{_place(frame.f_code)} for: {why}")
            return result
        except Exception as error:
            note(f"{_place(frame.f_code)} for: {_summary(str(error))}")
            raise
        finally:
            for broken in graph_break_reasons[known:]:
                where = broken.user_stack[-1] if broken.user_stack else None
                at = f"{os.path.basename(where.filename)}:{where.lineno}" if where is not None else _place(frame.f_code)
                note(f"{at} for: {_summary(broken.reason)}")

    ConvertFrameAssert.__call__ = __call__  # type: ignore[method-assign]


def gave_up(error: BaseException) -> str:
    """Why Dynamo cannot compile a function as one graph, if that is what it has raised; else ""."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

    if isinstance(error, FailOnRecompileLimitHit):
        return _summary(str(error.__cause__ or error))
    alone = isinstance(error, Unsupported) or "found no compiled frames" in str(error)
    return _summary(str(error)) if alone else ""


def skip(function: Any) -> None:
    """Have Dynamo never compile this function itself, whatever calls it; what it calls may be compiled."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)


def _place(code: types.CodeType) -> str:
    return f"{code.co_name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"


def _summary(message: str) -> str:
    """The first line of Dynamo's message, and its explanation."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    explained = [line.partition(": ")[2] for line in lines if line.startswith("Explanation:")]
    return ". ".join(line.rstrip(".") for line in [*lines[:1], *explained[:1]])[:LONGEST]


def compiling_is_off() -> str | None:
    """What has switched Dynamo off, or None."""
    from torch._dynamo import eval_frame

    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1"
    stance = eval_frame._stance.stance
    return None if stance == "default" else f"the stance {stance!r} of torch.compiler.set_stance"


def specialise(example_inputs: Sequence[Any]) -> None:
    """Fix every symbolic size to its value: a plan is made of bytes. Another size compiles another graph.

    A size that the user marked as dynamic is one of many, which get a plan each. Raises `UnsupportedModelError` for a
    size that no input has (`mark_unbacked`).
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    _allow_fixed_sizes(example_inputs)
    try:
        for value in example_inputs:
            if isinstance(value, torch.SymInt):
                int(value)
            elif isinstance(value, torch.Tensor):
                for size in (*value.shape, *value.stride()):
                    int(size)
    except GuardOnDataDependentSymNode as error:
        reason = f"it is not known when the graph is compiled ({error.cond}), and a plan is made of bytes"
        raise UnsupportedModelError("an input's size", reason, "drop mark_unbacked, or write mark_dynamic") from error


def _allow_fixed_sizes(example_inputs: Sequence[Any]) -> None:
    """Drop the demand of `mark_dynamic` that a size must not be fixed, which Dynamo checks when it makes guards."""
    mode = torch._guards.detect_fake_mode(list(example_inputs))
    tracked = None if mode is None or mode.shape_env is None else mode.shape_env.tracked_fakes
    for fake in tracked or ():
        for kind in ("constraint_sizes", "constraint_strides"):
            constraints = getattr(fake.symbolic_context, kind, None)
            if isinstance(constraints, list):
                constraints[:] = [None] * len(constraints)
