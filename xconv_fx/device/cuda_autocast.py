"""CUDA's autocast rules, in effect on tensors that are not on CUDA.

A plan for a GPU is traced on fake tensors of the CPU, because autograd refuses those of a device that torch was not
built for. `torch.autocast("cpu")` would trace another network: it runs padding, pooling and concatenation in other
dtypes than CUDA's rules, and has no rule for softmax, norms or sums. CUDA's rules themselves are in every build of
torch, but only ever apply to tensors on CUDA. So while `cuda_autocast` is active, the kernels behind the dispatch key
AutocastCUDA are replaced by ones in Python that make the same casts on any device, and the key is included for every
operation of this thread.

The lists are those of torch/include/ATen/autocast_mode.h in torch 2.13, documented under "CUDA Ops that can autocast to
float16" and following in `torch.amp`.

Known gaps: casts of weights are not cached, which the compiler's elimination of common subexpressions makes up for.
Another thread that trains under CUDA's autocast meanwhile gets the same casts, by slower kernels. A model that disables
autocast for its input's type of device (`torch.autocast(x.device.type, enabled=False)`) names the CPU, to no effect.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from xconv_fx.hooks import dispatch
from xconv_fx.hooks.dispatch import OpOverload, autocast_cuda_included, below_autocast_cuda
from xconv_fx.hooks.pytree import tree_iter, tree_map_only

LOWER_PRECISION = """
    _convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm
    bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention
"""
FLOAT32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim
    nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
    hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
    multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits
    dist pdist cdist renorm logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
    _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa
"""
# These compute in float32 by their argument `dtype`, unless the caller has set it.
FLOAT32_RESULT = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
"""
# By the overload that has such an argument.
FLOAT32_OVERLOAD = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast("cuda", dtype)` for whatever runs within, on tensors of any device.

    Changes what one dispatch key of this process does until it is left: for tracing, not for training.
    """
    library = torch.library.Library("aten", "IMPL")
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        with warnings.catch_warnings():
            # Replacing kernels is the point; torch warns of the first.
            warnings.filterwarnings("ignore", message=".*other operators may also be overridden", category=UserWarning)
            for name, kernel in _kernels():
                library.impl(name, kernel, "AutocastCUDA")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        with autocast_cuda_included():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        dispatch.put_back(library)


def _kernels() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in LOWER_PRECISION.split():
        yield name, _casting(_overload(name), lambda _: torch.get_autocast_dtype("cuda"))
    for name in FLOAT32.split():
        yield name, _casting(_overload(name), lambda _: torch.float32)
    for name in WIDEST.split():
        yield name, _casting(_overload(name), _widest)
    for name in FLOAT32_RESULT.split():
        yield name, _float32_result(_overload(name), _overload(name))
    for name, other in FLOAT32_OVERLOAD.items():
        yield name, _float32_result(_overload(name), _overload(other))
    yield "binary_cross_entropy", _refused


def _overload(name: str) -> OpOverload:
    packet, _, overload = name.partition(".")
    found: OpOverload = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return found


def _casting(operator: OpOverload, dtype: Callable[[Any], torch.dtype]) -> Callable[..., Any]:
    """The operator with its floating-point tensors cast to `dtype` of its arguments."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with below_autocast_cuda():
            wanted = dtype((args, kwargs))
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(wanted) if _is_eligible(t) else t, (args, kwargs))
            return operator(*args, **kwargs)

    return kernel


def _float32_result(operator: OpOverload, typed: OpOverload) -> Callable[..., Any]:
    """The operator by its overload `typed`, whose argument `dtype` is float32 unless it is given."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with below_autocast_cuda():
            if not _is_eligible(args[0]):
                return operator(*args, **kwargs)
            declared = dispatch.arguments_of(operator)
            named = {item.name: item.default_value for item in declared if item.has_default_value()}
            named.update(zip((item.name for item in declared), args, strict=False), **kwargs)
            if named.get("dtype") is None:
                named["dtype"] = torch.float32
            return typed(**named)

    return kernel


def _refused(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "binary_cross_entropy is unsafe to autocast: write binary_cross_entropy_with_logits or BCEWithLogitsLoss"
    )


def _is_eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _widest(arguments: Any) -> torch.dtype:
    """float32 if any tensor is, else the lower precision."""
    dtypes = {value.dtype for value in tree_iter(arguments) if _is_eligible(value)}
    return torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype("cuda")
