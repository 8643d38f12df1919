"""Inductor's Python wrapper for CUDA, read as text: its kernels' sources, their launches, and the other calls it makes.

Checked with torch 2.13.0.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import types
from collections import Counter
from pathlib import Path

# What calls for nothing on the device.
_FREE = ("torch.ops.aten.view", "torch.ops.aten.reshape", "torch.ops.aten.as_strided")
# Ways to wait for the device, or to bring values to the host.
_WAITING = (".item(", ".tolist(", ".cpu(", "synchronize(", "_local_scalar_dense", "empty_strided_cpu(", "nonzero(")
# Imports the driver of a GPU that is there.
_DRIVER = "triton_helpers.set_driver_to_gpu()"


def kernels(code: str) -> dict[str, str]:
    """The source of every Triton kernel by its name."""
    found = {}
    for name, call in _compiled(code):
        if ast.unparse(call.func) == "async_compile.triton":
            assert isinstance(call.args[1], ast.Constant)
            found[name] = str(call.args[1].value)
    return found


def other_kernels(code: str) -> list[str]:
    """Names of the kernels that are not Triton's."""
    return [name for name, call in _compiled(code) if ast.unparse(call.func) != "async_compile.triton"]


def launches(code: str) -> Counter[str]:
    """How often each Triton kernel is launched."""
    names = kernels(code)
    found: Counter[str] = Counter()
    for call in _calls(code):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "run" and ast.unparse(call.func.value) in names:
            found[ast.unparse(call.func.value)] += 1
    return found


def fallbacks(code: str) -> Counter[str]:
    """Calls into libraries and eager operators, by name, and how often they stand in the code."""
    found: Counter[str] = Counter()
    for call in _calls(code):
        name = ast.unparse(call.func)
        if name.startswith(("torch.ops.", "extern_kernels.", "aten.")) and not name.startswith(_FREE):
            found[name.removeprefix("torch.ops.").removesuffix(".default")] += 1
    return found


def convolutions(code: str) -> list[str]:
    """The calls of convolutions, as text."""
    return [text for call in _calls(code) if "convolution" in (text := ast.unparse(call))]


def partitions(code: str) -> dict[str, str]:
    """The functions that a CUDA graph captures each, as text, by name."""
    return {
        node.name: ast.unparse(node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("partition_")
    }


def waits(code: str) -> list[str]:
    """What in the code that runs waits for the device, or makes a tensor of the host."""
    text = "\n".join(ast.unparse(node) for node in _bodies(code))
    return [one for one in _WAITING if one in text]


def module(name: str, source: str, folder: Path, driver: str = "") -> types.ModuleType:
    """The module of a kernel's source, from a file, since Triton reads it. `driver` replaces how it asks for one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"k{hashlib.sha256((source + driver).encode()).hexdigest()[:20]}.py"
    path.write_text(source.replace(_DRIVER, driver))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def _compiled(code: str) -> list[tuple[str, ast.Call]]:
    """What the module binds to compiled kernels."""
    return [
        (node.targets[0].id, node.value)
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).startswith("async_compile.")
    ]


def _bodies(code: str) -> list[ast.AST]:
    """The functions that run: those of the step and of its partitions."""
    return [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.FunctionDef) and (node.name == "call" or node.name.startswith("partition_"))
    ]


def _calls(code: str) -> list[ast.Call]:
    return [node for body in _bodies(code) for node in ast.walk(body) if isinstance(node, ast.Call)]
