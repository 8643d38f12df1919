"""Run a model for what can be learnt from it, and leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from xconv_fx.hooks.modules import put_buffer


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Buffers, gradients, modes and the state of torch's random generators are, after this context, as before it.

    Inside, gradients are None, and a model that was in evaluation mode is in training mode.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    for parameter, _ in gradients:
        parameter.grad = None
    if not model.training:
        model.train()
    try:
        with saved_buffers(model), torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def saved_buffers(model: nn.Module) -> Iterator[None]:
    """Each buffer is, after this context, the tensor that it was, with its value: a module may change or replace it."""
    buffers = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, (buffer, value) in buffers.items():
            owner, _, key = name.rpartition(".")
            with torch.no_grad():
                put_buffer(model.get_submodule(owner), key, buffer.copy_(value))
