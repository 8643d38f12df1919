"""How ATen and Inductor run an operation: which convolution, by a call or by a generated kernel, under which settings.

Private parts of PyTorch, read in torch 2.13: `torch._C._select_conv_backend`, `torch._C._get_nnpack_enabled`,
`OpOverload.is_view`, the tables of `torch._inductor.lowering`, the guards of dispatch keys in `torch._C`, and
`_disable_current_modes`, which suspends whatever intercepts operations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
# What `torch.nn.functional.pad` is in a graph of Dynamo's.
PAD = torch._C._nn.pad  # type: ignore[attr-defined]


@functools.cache
def _fakes() -> FakeTensorMode:
    return FakeTensorMode()


def convolution_backend(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any]) -> str:
    """The name of ATen's backend for a convolution with this geometry, from stride to groups. Tensors may be fake."""
    return str(torch._C._select_conv_backend(x, weight, bias, *geometry))


def stand_in(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A fake tensor on the CPU: one without memory, which ATen takes for one of the CPU's."""
    with _disable_current_modes(), _fakes():
        return torch.empty_strided(size, stride, dtype=dtype)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Within this context operations run on real tensors, whatever traces, casts or differentiates outside of it.

    The state of the CPU's random generator is what it was, afterwards.
    """
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        yield


def settings() -> Hashable:
    """What ATen goes by besides its arguments when it chooses a kernel for the CPU."""
    return (
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,
        torch._C._get_nnpack_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    )


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operation returns its argument's memory, or memory that nobody wrote, and allocates nothing else."""
    if not isinstance(func, torch._ops.OpOverload):
        return True
    return func.namespace == "prim" or func.is_view or func.overloadpacket in _BARE


_BARE = {
    aten.empty, aten.empty_strided, aten.empty_like, aten.empty_permuted, aten.new_empty, aten.new_empty_strided,
    aten._unsafe_view, aten.set_, aten.resize_, aten.lift_fresh, aten._local_scalar_dense, aten._assert_scalar,
    aten._assert_async, aten.sym_size, aten.sym_stride, aten.sym_numel, aten.sym_storage_offset,
}  # fmt: skip


def is_called(target: Any) -> bool:
    """Whether Inductor calls a kernel for an operation of a graph, whatever its arguments, and generates none."""
    from torch._inductor.lowering import fallbacks, lowerings

    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target in _TEMPLATES or target in fallbacks or target not in lowerings


_TEMPLATES = {
    aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default,
    aten.bmm.default, aten.baddbmm.default,
}  # fmt: skip


def is_profiled() -> bool:
    """Whether a profiler is running: there can be no other."""
    return torch.autograd._profiler_enabled()


def show_checkpointed_draws(mode: type[TorchDispatchMode]) -> None:
    """Let a mode see the draws of what a user checkpoints, which operators of a higher order make, and their states.

    `mode.__torch_dispatch__` is called as for any operator; its results are what the operator of a higher order gives.
    """
    from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

    def saving(mode: Any, *args: Any, **kwargs: Any) -> Any:
        return mode.__torch_dispatch__(run_and_save_rng_state, (), args, kwargs)

    def restoring(mode: Any, *args: Any, **kwargs: Any) -> Any:
        return mode.__torch_dispatch__(run_with_rng_state, (), args, kwargs)

    run_and_save_rng_state.py_impl(mode)(saving)
    run_with_rng_state.py_impl(mode)(restoring)


def autocast_cuda_included() -> Any:
    """A context in which every operation of this thread goes through the rules of CUDA's autocast."""
    return torch._C._IncludeDispatchKeyGuard(torch._C.DispatchKey.AutocastCUDA)


def below_autocast_cuda() -> Any:
    """A context in which none does: for the kernels behind those rules."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA))


def arguments_of(operator: Any) -> Sequence[Any]:
    """The arguments that an overload of an operator declares: their names, and their defaults."""
    declared: Sequence[Any] = operator._schema.arguments
    return declared


def name_of(operator: Any) -> str:
    """The name of an overload of an operator, with its namespace; "" for any other function."""
    return str(getattr(operator, "_name", ""))


def put_back(library: torch.library.Library) -> None:
    """Take away the kernels that a library put into the place of torch's own."""
    library._destroy()
