"""What a plan is made for, besides the model: the device, the GPU, mixed precision, layout and optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xconv_fx.cost_model.allocator import PARTLY_FREE, block_bytes
from xconv_fx.cost_model.device import DEVICES
from xconv_fx.cost_model.gpus import GPUS, Gpu
from xconv_fx.errors import OptionError, join_clauses, nearest
from xconv_fx.hooks.fake import cudnn_layouts
from xconv_fx.units import format_size

from . import rates
from .cuda_autocast import cuda_autocast
from .cudnn import WORKSPACE_LIMIT

# Tensors of a parameter's size and dtype that each optimiser keeps of it from step to step.
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Scenario:
    """How a model is to be trained. `device` "cpu" or "cuda"; None is where the model is.

    `amp` is the lower precision of autocast, `channels_last` says that model and inputs are laid out so, `optimizer` is
    one of `OPTIMIZERS`.
    """

    device: str | None = None
    gpu: Gpu | None = None
    amp: str | None = None
    channels_last: bool = False
    optimizer: str | None = None

    @staticmethod
    def parse(
        device: str | None = None,
        gpu: str | None = None,
        amp: str | None = None,
        channels_last: bool = False,
        optimizer: str | None = None,
    ) -> Scenario:
        """Check what the user wrote; a GPU implies "cuda". Raises `OptionError`."""
        _check("device", device, DEVICES)
        _check("gpu", gpu, GPUS)
        _check("amp", amp, AMP)
        _check("optimizer", optimizer, OPTIMIZERS)
        if not isinstance(channels_last, bool):
            raise OptionError("channels_last", channels_last, "write True or False")
        board = None if gpu is None else GPUS[gpu]
        if board is not None and device == "cpu":
            raise OptionError("gpu", gpu, "a GPU is not a CPU: leave out the device, or the GPU")
        if board is not None and not board.bfloat16 and amp == "bf16":
            raise OptionError("amp", amp, f"a {gpu} has no bfloat16 arithmetic; write fp16")
        device = device if board is None else "cuda"
        if amp == "fp16" and device == "cpu":
            raise OptionError("amp", amp, "CPUs do not train in float16; write bf16, or plan for the device cuda")
        return Scenario(device, board, amp, channels_last, optimizer)

    @property
    def moves(self) -> bool:
        """Whether graphs are traced on the CPU and then moved to CUDA."""
        return self.device == "cuda"

    @contextlib.contextmanager
    def in_effect(self, home: str) -> Iterator[None]:
        """Trace and plan within this: autocast, layouts and rates are those of the device.

        `home` is the type of the device that the traced tensors are on.
        """
        with contextlib.ExitStack() as stack:
            if self.gpu is not None:
                stack.enter_context(rates.assumed(self.gpu.spec()))
            if self.moves:
                stack.enter_context(cudnn_layouts())
            if self.amp is not None:
                dtype = AMP[self.amp]
                stack.enter_context(cuda_autocast(dtype) if self.moves else torch.autocast(home, dtype))
            yield

    def optimizer_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of the optimiser's state for those of the parameters that are trained, in their own dtypes."""
        copies = OPTIMIZERS[self.optimizer or "sgd"]
        return copies * sum(self._stored(p) for p in parameters if p.requires_grad)

    def _stored(self, value: Tensor) -> int:
        size = value.numel() * value.element_size()
        return block_bytes(size) if self.moves else size

    def facts(self, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        """The fields of a `Plan` that say what it was made for."""
        facts: dict[str, Any] = {}
        if self.optimizer is not None:
            facts |= {"optimizer": self.optimizer, "optimizer_bytes": self.optimizer_bytes(parameters)}
        if self.gpu is not None:
            facts |= {"gpu": self.gpu.name, "gpu_memory": self.gpu.memory}
        return facts

    @property
    def notes(self) -> tuple[str, ...]:
        """What of a plan for CUDA is assumed, and what it does not count."""
        if not self.moves:
            return ()
        return (
            "traced without a GPU: as on CUDA in dtypes and layouts, but Python code of the model saw tensors of a CPU",
            "counted as torch's CUDA allocator does, in blocks of 512 bytes, of 2 MiB from 10 MiB on; its partly free "
            f"segments, {format_size(PARTLY_FREE)} or more, are not, and neither is the CUDA context, some 500 MB",
            "cuDNN's workspaces are assumed: copies of what is not channels-last, sums of weight gradients in float32, "
            f"at most {format_size(WORKSPACE_LIMIT)} a convolution",
            "the first step takes more: it times kernels, with a buffer of the L2 cache's size and copies of what they "
            "write to, and with cudnn.benchmark convolutions as well",
        )


def _check(option: str, value: object, choices: Iterable[str]) -> None:
    names = list(choices)
    if value is not None and value not in names:
        guess = nearest(value, names) if isinstance(value, str) else ""
        raise OptionError(option, value, join_clauses(guess, f"write one of {', '.join(names)}"))
