"""Models and graphs without memory, for a device that need not be there.

A plan is made of shapes, so everything it is traced on is fake: `fakes` copies a model and its inputs with fake tensors
in the place of real ones or those of the meta device, and allocates nothing.

For a GPU the trace is made on fake tensors of the *CPU*, and `place` afterwards moves its graphs. torch aborts the
process when autograd meets a tensor of a device that the build does not know, and what is fake about it changes
nothing. Three things differ between the devices before that, and are settled while tracing:

* autocast has other rules (`device/cuda_autocast.py`);
* a convolution's layout: oneDNN and cuDNN follow the same rule (channels-last if an operand is), but torch's CPU code
  falls back to other libraries for 16-bit floats on older processors, and these are contiguous (`cudnn_layouts`);
* volumes are laid out channels-last for oneDNN only (`passes/channels_last_3d.py`).

Which layout Inductor chooses for images depends on the device, too, and is asked of it after the move.

Known gaps: the model's own code sees CPU tensors, so `if x.is_cuda` takes the other branch; attention is traced with
the CPU's kernel, which holds as much as CUDA's flash attention; statistics that layer norm saves of 16-bit inputs have
16 bits on the CPU, and 32 on CUDA.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from xconv_fx.errors import UnsupportedModelError
from xconv_fx.hooks.fake import FakeTensorMode
from xconv_fx.hooks.modules import values_of


def fake_module(module: nn.Module, mode: FakeTensorMode, device: str | None, channels_last: bool = False) -> nn.Module:
    """A copy of the module whose parameters, buffers and other tensors are fake, on `device` (None: where they are).

    Tensors of the meta device go to the CPU. Raises `UnsupportedModelError` for a module that cannot be copied, or
    whose parameters have no shapes yet.
    """
    memo: dict[int, Any] = {}
    for layer in module.modules():
        for value in values_of(layer):
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
