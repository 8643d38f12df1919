"""The memory of a training step while a user's program runs it: what is allocated from a moment on, at its most.

By the convention of `measure.py`: resident is what was there before and belongs to the model (parameters, buffers,
inputs), each storage counted once; transient is the most that was allocated on top of that. On the CPU a watch of the
allocator tells (`hooks/allocator_watch.py`), to the byte what `measure.physical_peak` would; on CUDA the allocator's
own statistics, whose maximum is reset for it.

What an optimiser makes for its state at its first step stays, and is no part of a budget: it counts as if it had been
there before. What compilers allocate in between is not counted on the CPU.

Known gap of CUDA: whether a tensor was there before cannot be looked up; without a `grad_fn`, it is taken to have been.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from xconv_fx import hooks
from xconv_fx.hooks import allocator_watch
from xconv_fx.hooks.weak import weak_method


def prepare(device: str) -> None:
    """Build what watching this device needs, which takes the first step some seconds. Raises what that raises."""
    if torch.device(device).type == "cpu":
        allocator_watch.prepare()


class StepMemory:
    """Watches one device from here on, until `end` or until nobody holds it.

    `unusual` tells whether something was compiled meanwhile, whose frames may have held the step's tensors for longer
    than a step does where all is compiled, or whether on CUDA a graph ran for the first time: Inductor then times its
    kernels, with a buffer of the L2 cache's size and copies of operands, cuDNN looks for algorithms
    (`torch.backends.cudnn.benchmark`), and libraries allocate what they keep.

    Raises `RuntimeError` when the device's allocator cannot be watched.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._storages: dict[int, int] = {}
        self._known: set[int] = set()
        self._highest = 0
        self._watch: Any = _CudaWatch(self.device) if self.device.type == "cuda" else allocator_watch.CpuWatch()
        self.unusual = self._paused = False
        self._compiling = contextlib.ExitStack()
        self._compiling.enter_context(hooks.while_compiling(weak_method(self._pause)))

    def _pause(self, on: bool) -> None:
        self.unusual |= on
        if on != self._paused and self.device.type == "cpu":
            self._paused = on
            allocator_watch.pause(on)

    def runs_anew(self) -> None:
        """A graph is about to run for the first time."""
        self.unusual |= self.device.type == "cuda"

    @property
    def peak(self) -> int:
        """Bytes: what was there, and the most that came on top of it until the last `keep`."""
        return sum(self._storages.values()) + self._highest

    def resident(self, values: Iterable[Any]) -> None:
        """These tensors belong to the model's step: those that were there before it count as resident."""
        for address, value in self._addresses(values).items():
            if address and address not in self._storages and not self._watch.owns(address, value):
                self._storages[address] = value.untyped_storage().nbytes()

    def keep(self) -> None:
        """What was allocated so far is part of the step."""
        self._highest = max(self._highest, self._watch.most)

    def mark(self, state: Iterable[Any]) -> None:
        """Before an optimiser's step, which has this state already. What was not kept is forgotten."""
        self._known = set(self._addresses(state))
        self._watch.restart()

    def disown(self, state: Iterable[Any]) -> None:
        """After an optimiser's step: what is new of its state is to count as if it had been there before."""
        most = self._watch.most
        new = {address: value for address, value in self._addresses(state).items() if address not in self._known}
        # What the optimiser needs besides comes when it has made its state.
        made = sum(self._watch.disown(address, value) for address, value in new.items())
        self._highest = max(self._highest, most - made)
        self._watch.restart()

    def _addresses(self, values: Iterable[Any]) -> dict[int, Tensor]:
        tensors = (v for v in values if isinstance(v, Tensor) and v.device.type == self.device.type)
        return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}

    def end(self) -> None:
        """Stop watching."""
        self._compiling.close()
        self._pause(False)
        self._watch.end()


class _CudaWatch:
    """The CUDA allocator's statistics, as `CpuWatch` gives those of the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated(device)
        self.restart()

    @property
    def most(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def owns(self, address: int, tensor: Tensor) -> bool:
        return tensor.grad_fn is not None

    def disown(self, address: int, tensor: Tensor) -> int:
        self.before += tensor.untyped_storage().nbytes()
        return tensor.untyped_storage().nbytes()

    def end(self) -> None:
        """Nothing was changed."""
