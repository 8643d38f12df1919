"""What Python code of torch and Triton asks a CUDA device, answered for one that is not there.

`install(capability)` is for the process that loaded the shim, once. After it fake tensors on "cuda:0" go through
autograd, Dynamo, AOTAutograd and Inductor, with CUDA's layouts of convolutions and its autocast, and Inductor generates
Triton code for a GPU of that compute capability. Nothing can be run on the device.

Everything is private to torch 2.13.0 and triton 3.7.1.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """A GPU: name, multiprocessors, bytes of shared memory a block may ask for, bytes of the L2 cache."""

    name: str
    multiprocessors: int
    shared: int
    cache: int


CHIPS = {
    80: Chip("A100 that is not there", 108, 166912, 40 << 20),
    90: Chip("H100 that is not there", 132, 232448, 50 << 20),
    100: Chip("B200 that is not there", 148, 232448, 126 << 20),
}


def install(capability: int = 90) -> None:
    """Answer for a GPU of this compute capability, a key of `CHIPS`."""
    assert torch.version.cuda is None, "this torch has CUDA: use it"
    properties = _properties(capability)
    _answer_torch(properties, capability)
    _answer_dynamo(properties, capability)
    _answer_triton(capability)
    _run_nothing()
    _forget_answers()


def _properties(capability: int) -> types.SimpleNamespace:
    chip, (major, minor) = CHIPS[capability], divmod(capability, 10)
    return types.SimpleNamespace(
        name=chip.name,
        major=major,
        minor=minor,
        multi_processor_count=chip.multiprocessors,
        total_memory=80 * _GIB,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=chip.shared,
        shared_memory_per_multiprocessor=chip.shared,
        L2_cache_size=chip.cache,
        gcnArchName="",
        is_integrated=0,
        is_multi_gpu_board=0,
        uuid="0",
    )


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _answer_torch(properties: types.SimpleNamespace, capability: int) -> None:
    """`torch.cuda`, and the names that only builds for CUDA bind, which generated code and CUDA graphs import."""
    cuda: Any = torch.cuda
    answers = {
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
        **dict.fromkeys(("init", "_lazy_init", "set_device", "synchronize", "set_rng_state"), None),
        **dict.fromkeys(("current_device", "memory_allocated", "_exchange_device", "_maybe_exchange_device"), 0),
        "device_count": 1,
        "get_device_name": properties.name,
        "get_device_capability": divmod(capability, 10),
        "get_device_properties": properties,
        "get_arch_list": [f"sm_{capability}"],
        "mem_get_info": (80 * _GIB, 80 * _GIB),
    }
    for name, value in answers.items():
        setattr(cuda, name, _always(value))
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.random.set_rng_state = _always(None)
    modes: Any = torch.amp.autocast_mode
    modes.amp_definitely_not_available = cuda.amp.common.amp_definitely_not_available = _always(False)
    for name in ("getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream"):
        setattr(torch._C, f"_cuda_{name}", _always(0))
    torch._C._cuda_cudaCachingAllocator_is_enabled = _always(True)


def _answer_dynamo(properties: types.SimpleNamespace, capability: int) -> None:
    from torch._dynamo import device_interface

    answers = {
        **dict.fromkeys(("current_device", "get_raw_stream", "exchange_device", "maybe_exchange_device"), 0),
        **dict.fromkeys(("set_device", "synchronize", "raise_if_triton_unavailable"), None),
        **dict.fromkeys(("is_available", "is_triton_capable", "is_bf16_supported"), True),
        "device_count": 1,
        "memory_allocated": 0,
        "get_device_properties": properties,
        "get_compute_capability": capability,
    }
    methods = {name: staticmethod(_always(value)) for name, value in answers.items()}
    base = device_interface.CudaInterface
    worker = type("Worker", (base.Worker,), {n: methods[n] for n in ("get_device_properties", "current_device")})
    device_interface.init_device_reg()
    device_interface._device_initialized = True
    interface = type("NotThere", (base,), {**methods, "Worker": worker})
    device_interface.device_interfaces.update({"cuda": interface, "cuda:0": interface})


def _answer_triton(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    answers = {
        "get_current_target": GPUTarget("cuda", capability, 32),
        "get_current_device": 0,
        "get_current_stream": 0,
        "get_active_torch_device": torch.device("cuda", 0),
        "get_device_capability": divmod(capability, 10),
        "is_active": True,
    }
    driver = types.SimpleNamespace(**{name: _always(value) for name, value in answers.items()})
    driver.map_python_to_cpp_type = lambda kind: kind
    triton.runtime.driver.set_active(driver)


def _run_nothing() -> None:
    """What Inductor runs on a device while it compiles.

    Patterns are not traced, constants are folded on the CPU, and of choices that would be timed the first is taken.
    """
    from torch._inductor.codegen.triton import TritonScheduling
    from torch._inductor.fx_passes import fuse_attention, joint_graph, misc_patterns, pad_mm
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    triton_helpers.set_driver_to_gpu = _always(None)
    TritonScheduling.benchmark_codegened_module = lambda self, module, *_, **__: (1.0, module.__file__)
    tuner: Any = AlgorithmSelectorCache
    tuner.make_precompile_fn = _always(dict)
    tuner.make_benchmark_fn = _always(lambda choices, **_: {one: float(n) for n, one in enumerate(choices)})
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = misc_patterns._misc_patterns_init = _always(None)
    folder = joint_graph.UniformValueConstantFolder
    deduce = folder._deduce_value

    def on_cpu(self: Any, node: torch.fx.Node) -> Any:
        given = node.kwargs
        if given.get("device") is None:
            return deduce(self, node)
        node.kwargs = {**given, "device": torch.device("cpu")}
        try:
            return deduce(self, node)
        finally:
            node.kwargs = given

    folder._deduce_value = on_cpu


def _forget_answers() -> None:
    """Answers that were given before the device was there."""
    import torch.utils._triton as asked
    from torch._inductor.runtime.hints import DeviceProperties

    for cached in (asked.has_triton, asked.triton_backend, asked.triton_hash_with_backend, DeviceProperties.create):
        cached.cache_clear()
    assert asked.has_triton()
