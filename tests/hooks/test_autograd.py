"""What a backward sees in a thread of its own: the context variables of whoever called it."""

from __future__ import annotations

from contextvars import ContextVar

import torch
from helpers import device_thread

from xconv_fx import hooks

NAME: ContextVar[str] = ContextVar("name", default="nobody's")
OTHER: ContextVar[int] = ContextVar("other", default=0)


def loss_that_calls(function):
    """A scalar whose backward calls the function."""
    x = torch.ones(2, requires_grad=True) * 2
    x.register_hook(lambda gradient: function())
    return x.sum()


def test_a_backward_in_a_thread_of_its_own_sees_its_callers_variables():
    seen: list[object] = []
    look = hooks.as_called(lambda: seen.append((NAME.get(), OTHER.get())))
    token = NAME.set("the caller's")
    try:
        device_thread.backward(loss_that_calls(lambda: seen.append(NAME.get())))
        device_thread.backward(loss_that_calls(look))
        loss_that_calls(look).backward()
    finally:
        NAME.reset(token)
    device_thread.backward(loss_that_calls(look))
    assert seen == ["nobody's", ("the caller's", 0), ("the caller's", 0), ("nobody's", 0)]


def test_what_the_thread_has_set_itself_stays():
    seen: list[object] = []

    def inside() -> None:
        NAME.set("the thread's")
        hooks.as_called(lambda: seen.append((NAME.get(), OTHER.get())))()

    names, others = NAME.set("the caller's"), OTHER.set(3)
    try:
        device_thread.backward(loss_that_calls(inside))
        assert NAME.get() == "the caller's"
    finally:
        NAME.reset(names)
        OTHER.reset(others)
    assert seen == [("the thread's", 3)]


def test_outside_of_a_backward_the_function_is_called_as_it_is():
    assert hooks.as_called(lambda value, *, more: value + more)(1, more=2) == 3
