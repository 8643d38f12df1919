"""What AOTAutograd refuses to do with a compiled backward: run it again, and differentiate it.

Private parts of PyTorch, read in torch 2.13: `torch/_functorch/_aot_autograd/runtime_wrappers.py`.

Saved tensors that nobody else sees are *donated*: generated code may write results over them, which saves memory in
every step. AOTAutograd therefore refuses `retain_graph=True`. Here such tensors are copied when the graph is kept, and
written over otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from xconv_fx.errors import DoubleBackwardError


def repeatable(backward: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """A backward that was just compiled, as one that may run again. Takes the list of its arguments and empties it."""
    donated = _donated()
    if not donated:
        return backward
    places = tuple(donated)
    # AOTAutograd's own list, by which it refuses at run time.
    donated.clear()

    def run(arguments: list[Any]) -> Any:
        if torch._C._autograd._get_current_graph_task_keep_graph():
            for place in places:
                arguments[place] = torch._prims_common.clone_preserve_strides(arguments[place])
        return backward(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _donated() -> list[int] | None:
    context = torch._guards.TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    return None if metadata is None else metadata.bw_donated_idxs


@contextlib.contextmanager
def named_double_backward() -> Iterator[None]:
    """Code that is compiled meanwhile raises `DoubleBackwardError` when its gradients are differentiated."""
    from torch._functorch._aot_autograd.runtime_wrappers import _AOTDispatchAutogradFunctionFactory as Factory

    build = Factory.build

    def named(self: Any) -> Any:
        function: Any = build(self)
        function._double_backward = staticmethod(_refusing(function._double_backward))
        return function

    with mock.patch.object(Factory, "build", named):
        yield


def _refusing(double_backward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        gradients = double_backward(*arguments)
        for node in {value.grad_fn for value in gradients if isinstance(value, Tensor)}:
            if node is not None:
                node.register_prehook(_refuse)
        return gradients

    return run


def _refuse(_: Any) -> None:
    raise DoubleBackwardError
