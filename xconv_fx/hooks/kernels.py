"""Generated modules whose kernels are compiled late, and together.

Late: a plan that the audit abandons costs no C++ compilation. Together: Inductor compiles every C++ kernel into a
library of its own, of which most of the time goes into headers and linking (0.65 of 0.75 s for a typical kernel of
these graphs). Here the kernels of both halves of a step go into one library for each compiler process that may run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

# The header that every C++ kernel starts with, and the kernel's own declaration.
_PREFIX = re.compile(r"\s*#include <torch/csrc/inductor/cpp_prefix\.h>\n")
# What the bindings include, which must not happen inside a namespace.
_HEADERS = ("#include <Python.h>", "#include <sstream>", "#include <cstdlib>", "#include <cerrno>")
# How a wrapper names its partitions.
_PARTITIONS = re.compile(r"^runner = Runner\(partitions=\[(.*?),?\]\)$", re.MULTILINE)
_DECLARATION = re.compile(r'extern "C"\s+void\s+kernel\(')


class Deferred:
    """Generated modules whose kernels are not compiled until `load`: an abandoned plan costs no C++ compilation."""

    def __init__(self) -> None:
        self.modules: list[_DeferredModule] = []

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """While active, Inductor gets a stand-in for every module that it would compile."""
        from torch._inductor.codecache import PyCodeCache

        load = PyCodeCache.load_by_key_path

        def defer(key: str, path: str, linemap: Any = None, attrs: Any = None, **options: Any) -> types.ModuleType:
            if attrs is None:  # No wrapper, which is given its constants, but a kernel that is to be timed now.
                return load(key, path, linemap, **options)
            self.modules.append(_DeferredModule(path, lambda: load(key, path, linemap, attrs, **options)))
            return self.modules[-1]

        with mock.patch.object(PyCodeCache, "load_by_key_path", defer):
            yield

    def load(self, config: dict[str, Any]) -> None:
        """Compile every kernel now, under Inductor's `config`."""
        import torch._inductor.config as inductor_config

        with inductor_config.patch(config):
            library = _Library()
            with library.collect():
                for module in self.modules:
                    module.load()
            library.compile()


class _DeferredModule(types.ModuleType):
    def __init__(self, path: str, load: Callable[[], types.ModuleType]) -> None:
        super().__init__("xconv_fx_deferred")
        self.__file__ = path
        self._load, self._call = load, None
        partitioned = _PARTITIONS.search(Path(path).read_text())
        self.runner = (
            None if partitioned is None else _DeferredRunner(len(partitioned[1].split(",")) if partitioned[1] else 0)
        )

    def load(self) -> None:
        module = self._load()
        self._call = module.call
        if self.runner is not None:
            self.runner.wrap(module.runner)

    def call(self, arguments: list[Any]) -> Any:
        if self._call is None:
            self.load()
        assert self._call is not None
        return self._call(arguments)


class _DeferredRunner:
    """What wraps the partitions of a module, which CUDA graphs capture one by one, until there is such a module."""

    def __init__(self, count: int) -> None:
        self._count, self._wrappers, self._runner = count, list[Any](), None

    def recursively_apply_fns(self, wrappers: Any) -> None:
        """Wrap each partition in the function of its place."""
        if self._runner is not None:
            self._runner.recursively_apply_fns(wrappers)
        else:
            self._wrappers.append(wrappers)

    def wrap(self, runner: Any) -> None:
        """Give the module's runner what was to wrap its partitions."""
        self._runner = runner
        for wrappers in self._wrappers:
            runner.recursively_apply_fns(wrappers)

    @property
    def partitions(self) -> list[Any]:
        """As many as the module has. Inductor deletes them with the graph, and so what was captured of them."""
        return [None] * self._count if self._runner is None else self._runner.partitions

    @partitions.deleter
    def partitions(self) -> None:
        self._wrappers.clear()
        if self._runner is not None:
            del self._runner.partitions


@dataclass
class _Kernel:
    """A C++ kernel that generated code calls: its arguments' types and source, and the function once it is compiled."""

    types: tuple[str, ...]
    source: str
    function: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        assert self.function is not None, "called before it was compiled"
        self.function(*arguments)


@dataclass
class _Library:
    """The C++ kernels of some generated modules."""

    kernels: dict[tuple[tuple[str, ...], str], _Kernel] = field(default_factory=dict)
    modules: list[dict[str, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """While active, modules that are executed get stand-ins for the kernels that can share a library."""
        from torch._inductor.async_compile import AsyncCompile

        alone, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait

        def cpp_pybinding(self_: Any, argtypes: list[str], source_code: str) -> Any:
            if not _shareable(source_code):
                return alone(self_, argtypes, source_code)
            key = (tuple(argtypes), source_code)
            return self.kernels.setdefault(key, _Kernel(*key))

        def wait_for_others(self_: Any, scope: dict[str, Any]) -> None:
            wait(self_, scope)
            self.modules.append(scope)

        with (
            mock.patch.object(AsyncCompile, "cpp_pybinding", cpp_pybinding),
            mock.patch.object(AsyncCompile, "wait", wait_for_others),
        ):
            yield

    def compile(self) -> None:
        """Compile what was collected, and put the functions in the place of the stand-ins."""
        from torch._inductor.async_compile import get_compile_threads

        parts = _balanced(list(self.kernels.values()), get_compile_threads())
        # Inductor's configuration is read here, in this thread; what is left to the others is the compiler.
        loaders = [_prepared(part) for part in parts]
        with ThreadPoolExecutor(max(1, len(loaders))) as compilers:
            paths = list(compilers.map(lambda load: load().path, loaders))
        for part, path in zip(parts, paths, strict=True):
            for number, kernel in enumerate(part):
                kernel.function = _function(path, number)
        for scope in self.modules:
            scope.update({name: value.function for name, value in scope.items() if isinstance(value, _Kernel)})


def _shareable(source: str) -> bool:
    """Whether the source is the usual header and one function, which can be renamed."""
    start = _PREFIX.match(source)
    return start is not None and "#include" not in source[start.end() :] and len(_DECLARATION.findall(source)) == 1


def _balanced(kernels: Sequence[_Kernel], count: int) -> list[list[_Kernel]]:
    """The kernels in at most `count` parts of about the same amount of code."""
    parts: list[list[_Kernel]] = [[] for _ in range(max(1, count))]
    for kernel in sorted(kernels, key=lambda kernel: -len(kernel.source)):
        min(parts, key=lambda part: sum(len(other.source) for other in part)).append(kernel)
    return [part for part in parts if part]


def _prepared(kernels: Sequence[_Kernel]) -> Callable[[], Any]:
    """A call that compiles the kernels into one library, and returns an object with its `path`.

    Every kernel is a Python module of its own in the library, by Inductor's template for bindings.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    class Library(CppPythonBindingsCodeCache):
        cache: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

        @classmethod
        def _load_library_inner(cls, path: str, key: str) -> Any:
            return types.SimpleNamespace(path=path)

    code = ["#include <torch/csrc/inductor/cpp_prefix.h>", "#define PY_SSIZE_T_CLEAN", *_HEADERS]
    for number, kernel in enumerate(kernels):
        plain = [type_.replace("const ", "") for type_ in kernel.types]
        parsed = ", ".join(f"parse_arg<{type_}>(args, {n})" for n, type_ in enumerate(plain))
        bindings = Library.suffix_template.format(
            arg_len=len(kernel.types),
            call_entry_func=f"{_name(number)}({parsed}); Py_RETURN_NONE;",
            entry_func=_name(number),
            extra_parse_arg="",
        )
        source = _DECLARATION.sub(f'extern "C" void {_name(number)}(', _PREFIX.sub("", kernel.source, count=1))
        # The bindings of one kernel repeat those of another but for the kernel's name.
        code += [f"namespace part_{number} {{", source, bindings, "}"]
    load: Callable[[], Any] = Library.load_async("\n".join(code))
    return load


def _name(number: int) -> str:
    return f"kernel_{number}"


def _function(path: str, number: int) -> Callable[..., None]:
    """The `number`-th kernel of the library."""
    from torch._C._dynamo import guards

    data_pointer = guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(data_pointer)
    spec = importlib.util.spec_from_file_location(_name(number), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., None] = getattr(module, _name(number))
    return function
