"""Models and graphs without memory, for a device that need not be there.

A plan is made of shapes, so everything it is traced on is fake: `fakes` copies a model and its inputs with fake tensors
in the place of real ones or those of the meta device, and allocates nothing.

For a GPU the trace is made on fake tensors of the *CPU*, and `place` afterwards moves its graphs. torch aborts the
process when autograd meets a tensor of a device that the build does not know, and what is fake about it changes
nothing. Three things differ between the devices before that, and are settled while tracing:

* autocast has other rules (`cuda_autocast.py`);
* a convolution's layout: oneDNN and cuDNN follow the same rule (channels-last if an operand is), but torch's CPU code
  falls back to other libraries for 16-bit floats on older processors, and these are contiguous (`cudnn_layouts`);
* volumes are laid out channels-last for oneDNN only (`passes/volumes.py`).

Which layout Inductor chooses for images depends on the device, too, and is asked of it after the move.

Private interfaces, checked with torch 2.13: `torch._C._select_conv_backend` and the fake rule of convolutions, which
calls it.

Known gaps: the model's own code sees CPU tensors, so `if x.is_cuda` takes the other branch; attention is traced with
the CPU's kernel, which holds as much as CUDA's flash attention; statistics that layer norm saves of 16-bit inputs have
16 bits on the CPU, and 32 on CUDA.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from . import hooks
from .errors import UnsupportedModelError
from .passes.graph import is_primal, is_tangent


def fake_mode() -> FakeTensorMode:
    """A mode to trace and to run models under: operations on its tensors compute shapes, and no values."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def fake_module(module: nn.Module, mode: FakeTensorMode, device: str | None, channels_last: bool = False) -> nn.Module:
    """A copy of the module whose parameters, buffers and other tensors are fake, on `device` (None: where they are).

    Tensors of the meta device go to the CPU. Raises `UnsupportedModelError` for a module that cannot be copied, or
    whose parameters have no shapes yet.
    """
    memo: dict[int, Any] = {}
    for layer in module.modules():
        for value in (*layer._parameters.values(), *layer._buffers.values(), *vars(layer).values()):
            if is_lazy(value):
                hint = f"give {type(layer).__name__} its sizes, or call the model once before it is planned"
                raise UnsupportedModelError(type(module).__name__, "it has layers whose sizes are not known yet", hint)
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = fake_tensor(value, mode, device, channels_last)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        reason = f"it cannot be copied ({type(error).__name__}: {error})"
        hint = "leave what copy.deepcopy refuses out of the module"
        raise UnsupportedModelError(type(module).__name__, reason, hint) from error


def fake_tensor(value: Tensor, mode: FakeTensorMode, device: str | None, channels_last: bool = False) -> Tensor:
    """A fake tensor of the same shape, strides and dtype; a `Parameter` for one."""
    place = device or ("cpu" if value.is_meta else value.device)
    with mode, torch.no_grad():
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=place)
        if channels_last and fake.dim() in (4, 5):
            order = torch.channels_last if fake.dim() == 4 else torch.channels_last_3d
            fake = torch.empty_like(fake, memory_format=order)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(fake, value.requires_grad)
    return fake.requires_grad_(value.requires_grad)


@contextlib.contextmanager
def cudnn_layouts() -> Iterator[None]:
    """Lay out what fake convolutions return as cuDNN does: channels-last if the input or the weight is.

    This is oneDNN's rule as well, so every convolution is said to run there.
    """
    chosen = torch._C._ConvBackend.Mkldnn  # type: ignore[attr-defined]
    with mock.patch.object(torch._C, "_select_conv_backend", lambda *_, **__: chosen):
        yield


def place(halves: Sequence[fx.GraphModule], device: str) -> None:
    """Move the graphs of a forward (the first) and its backward to `device`: tensors' values, and `device` arguments.

    What they compute of images is laid out as Inductor chooses for this device; parameters and inputs stay as they are.
    """
    nodes = [node for half in halves for node in half.graph.nodes]
    move = _Move(device)
    for node in nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device(device)}
        _map_values(node, "val", move)
    if hooks.channels_last_convolutions(halves[0]):
        move = _Move(device, images=True)
        for node in nodes:
            if not (is_primal(node) or is_tangent(node)):
                _map_values(node, "val", move)


def place_inputs(gm: fx.GraphModule, device: str) -> None:
    """Say of all values of a Dynamo graph that they are on `device`, for passes that ask before autograd traces it."""
    move = _Move(device)
    for node in gm.graph.nodes:
        _map_values(node, "example_value", move)


def _map_values(node: fx.Node, key: str, function: Callable[[FakeTensor], Tensor]) -> None:
    if key in node.meta:
        node.meta[key] = tree_map_only(FakeTensor, function, node.meta[key])


class _Move:
    """Fake tensors on another device, channels-last if they may be `images`; one for all of the same kind."""

    def __init__(self, device: str, images: bool = False) -> None:
        self.device, self.images = torch.device(device), images
        self.moved: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, value: FakeTensor) -> Tensor:
        kind = (tuple(map(int, value.shape)), tuple(map(int, value.stride())), value.dtype)
        if kind not in self.moved:
            meta = torch.empty_strided(*kind[:2], dtype=value.dtype, device="meta")
            if self.images and value.dim() == 4:
                meta = torch.empty_like(meta, memory_format=torch.channels_last)
            self.moved[kind] = FakeTensor(value.fake_mode, meta, self.device)
        return self.moved[kind]
