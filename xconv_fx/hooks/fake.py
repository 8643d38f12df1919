"""Tensors without memory: their modes, operations on them that are expected to fail, and the layouts of convolutions.

Private parts of PyTorch, read in torch 2.13: `torch/_subclasses/fake_tensor.py`, `torch._guards.detect_fake_mode`,
`torch._C._select_conv_backend`, and the fake rule of convolutions, which calls it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode


def fake_mode() -> FakeTensorMode:
    """A mode to trace and to run models under: operations on its tensors compute shapes, and no values."""
    # It imports sympy, which eager layers do without.
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode | None:
    """The mode of the fake tensors among these values; None without one."""
    return torch._guards.detect_fake_mode(list(values))


@contextlib.contextmanager
def trying_fake(values: Sequence[Any]) -> Iterator[None]:
    """Inside, tensors are fake, in the mode of those given; operations that fail raise, and are not logged."""
    mode = fake_mode_of(values) or FakeTensorMode()
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        with mode:
            yield
    finally:
        logger.disabled = disabled


@contextlib.contextmanager
def cudnn_layouts() -> Iterator[None]:
    """Lay out what fake convolutions return as cuDNN does: channels-last if the input or the weight is.

    This is oneDNN's rule as well, so every convolution is said to run there.
    """
    chosen = torch._C._ConvBackend.Mkldnn  # type: ignore[attr-defined]
    with mock.patch.object(torch._C, "_select_conv_backend", lambda *_, **__: chosen):
        yield


def runs_on_fakes(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether a graph of Dynamo's runs without an error on tensors like these, which it leaves as they are."""
    with (
        trying_fake(inputs),
        # A graph that fails halfway leaves its autocast and its gradient mode behind.
        torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu")),
        torch.set_grad_enabled(torch.is_grad_enabled()),
    ):
        try:
            _OnFakes(gm).run(*map(_like, inputs))
        except Exception:  # The model's own code fails at what it likes.
            return False
    return True


class _OnFakes(fx.Interpreter):
    """Runs a graph whose attributes are fakes as well."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _like(super().get_attr(target, args, kwargs))


def _like(value: Any) -> Any:
    """A new fake tensor, for a tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.requires_grad_(value.requires_grad)
