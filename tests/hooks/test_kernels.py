"""C++ kernels of several modules in few libraries, each under its own name."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache, PyCodeCache

from xconv_fx.hooks import kernels

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def source(factor: int) -> str:
    """`out[i] = factor * in[i]` for `n` floats, as Inductor writes its kernels."""
    return f"""
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const float* in_ptr0, float* out_ptr0, const int64_t n)
{{
    for (int64_t i = 0; i < n; i++) out_ptr0[i] = {factor} * in_ptr0[i];
}}
"""


TYPES = ["const float*", "float*", "const int64_t"]


def executed(library, sources):
    """Modules of generated code, as Inductor executes them: here each is one dictionary of kernels."""
    scopes = []
    with library.collect():
        for text in sources:
            compiler = AsyncCompile()
            scopes.append({"cpp_fused_0": compiler.cpp_pybinding(TYPES, text), "other": 3})
            compiler.wait(scopes[-1])
    return scopes


def test_kernels_share_a_library(monkeypatch):
    built = []
    load = CppPythonBindingsCodeCache.load_async.__func__

    def counted(cls, code, *args, **kwargs):
        built.append(code)
        return load(cls, code, *args, **kwargs)

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", classmethod(counted))
    library = kernels._Library()
    with config.patch(compile_threads=1):
        # Two modules have the same kernel.
        first, second, third = executed(library, [source(2), source(3), source(2)])
        library.compile()
    assert len(built) == 1 and built[0].count("extern") == 2
    x, out = torch.arange(5.0), torch.empty(5)
    for scope, factor in ((first, 2), (second, 3), (third, 2)):
        scope["cpp_fused_0"](x, out, 5)
        assert out.tolist() == [factor * value for value in x.tolist()]
        assert scope["other"] == 3
    with pytest.raises(RuntimeError, match="requires 3 args"):
        first["cpp_fused_0"](x, out)


def test_each_compiler_gets_a_part():
    library = kernels._Library()
    with config.patch(compile_threads=2):
        scopes = executed(library, [source(factor) for factor in (5, 6, 7)])
        library.compile()
    x, out = torch.ones(4), torch.empty(4)
    for scope, factor in zip(scopes, (5, 6, 7), strict=True):
        scope["cpp_fused_0"](x, out, 4)
        assert out.tolist() == [factor] * 4


def test_what_cannot_be_renamed_is_compiled_alone(monkeypatch):
    alone = []
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda self, types, text: alone.append(text))
    library = kernels._Library()
    unusual = [
        source(2).replace('extern "C"  void  kernel(', "template <int N> void kernel("),
        source(2) + "#include <vector>\n",
        source(2) + source(3),
    ]
    executed(library, [*unusual, source(4)])
    assert alone == unusual and len(library.kernels) == 1


def test_parts_are_balanced():
    made = [kernels._Kernel((), "x" * length) for length in (5, 1, 4, 2, 3)]
    parts = kernels._balanced(made, 2)
    assert sorted(sum(len(kernel.source) for kernel in part) for part in parts) == [7, 8]
    assert kernels._balanced(made[:1], 4) == [made[:1]] and kernels._balanced([], 4) == []


PARTITIONED = """
def partition_0(args):
    return ["first", *args]

def partition_1(args):
    return ["second", *args]

class Runner:
    def __init__(self, partitions):
        self.partitions = partitions

    def recursively_apply_fns(self, fns):
        self.partitions = [fn(part) for fn, part in zip(fns, self.partitions)]

    def call(self, args):
        return [part(args) for part in self.partitions]

runner = Runner(partitions=[partition_0, partition_1])
call = runner.call
recursively_apply_fns = runner.recursively_apply_fns
"""


def deferred(source, attrs=None):
    """A wrapper as Inductor loads it while its modules are collected."""
    collected = kernels.Deferred()
    key, path = PyCodeCache.write(source)
    with collected.collect():
        module = PyCodeCache.load_by_key_path(key, path, linemap=[], attrs=attrs)
    return collected, module


def test_what_wraps_partitions_waits_for_them():
    """Inductor wraps each partition in what captures it, as soon as it has the module."""
    collected, module = deferred(PARTITIONED, {})
    assert len(module.runner.partitions) == 2
    module.runner.recursively_apply_fns([lambda part, n=n: lambda args: [n, *part(args)] for n in (1, 2)])
    collected.load({})
    assert module.call([3]) == [[1, "first", 3], [2, "second", 3]]
    assert len(module.runner.partitions) == 2
    module.runner.recursively_apply_fns([lambda part: lambda args: [0, *part(args)]] * 2)
    assert module.call([3]) == [[0, 1, "first", 3], [0, 2, "second", 3]]
    del module.runner.partitions
    with pytest.raises(AttributeError):
        module.call([3])


def test_a_wrapper_of_one_partition_or_none():
    assert len(deferred(PARTITIONED.replace("partition_0, partition_1", "partition_0,"), {})[1].runner.partitions) == 1
    assert not deferred(PARTITIONED.replace("partition_0, partition_1", ""), {})[1].runner.partitions
    assert deferred("def call(args):\n    return args\n", {})[1].runner is None


def test_a_kernel_that_is_to_be_timed_is_not_deferred():
    collected, module = deferred("key, value = 'its own', 7\n")
    assert module.value == 7 and not collected.modules
