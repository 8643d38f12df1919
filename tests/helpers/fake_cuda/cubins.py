"""Cubins of generated kernels, and what they take: registers, local memory, shared memory.

`ptxas` and `cuobjdump` come with Triton. A kernel is compiled in the first configuration that its autotuner would try.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import wrapper
from .records import Cubin

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_USAGE = re.compile(r"(REG|STACK|LOCAL):(\d+)")
_DIVISION = re.compile(r"div\.(?:full|rn|approx)[.\w]*f\d+")


def cubins(code: str, capabilities: tuple[int, ...], folder: str) -> list[Cubin]:
    """Those of every kernel of a wrapper, for each compute capability."""
    return [
        _cubin(name, source, capability, folder)
        for name, source in wrapper.kernels(code).items()
        for capability in capabilities
    ]


@functools.cache
def _cubin(name: str, source: str, capability: int, folder: str) -> Cubin:
    from .generate import _installed

    _installed(90)
    tuned = getattr(wrapper.module(name, source, Path(folder)), name)
    config, meta, arguments = tuned.configs[0], tuned.triton_meta, tuned.fn.arg_names
    constants = {**meta.get("constants", {}), **config.kwargs}
    signature = {**meta["signature"], **dict.fromkeys(config.kwargs, "constexpr")}
    source = ASTSource(
        tuned.fn,
        {argument: signature[argument] for argument in arguments},
        {(arguments.index(one),): value for one, value in constants.items() if one in arguments},
        meta["configs"][0],
    )
    return usage(name, source, capability, {"num_warps": config.num_warps, "num_stages": config.num_stages})


def usage(name: str, source: ASTSource, capability: int, options: dict[str, Any]) -> Cubin:
    """What a kernel takes that is compiled for a compute capability."""
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([str(_CUOBJDUMP), "-res-usage", file.name], capture_output=True, text=True, check=True)
    taken = {key: int(value) for key, value in _USAGE.findall(said.stdout)}
    divisions = tuple(sorted(set(_DIVISION.findall(compiled.asm["ptx"]))))
    local = taken["STACK"] + taken["LOCAL"]
    return Cubin(name, capability, taken["REG"], local, int(compiled.metadata.shared), divisions)
