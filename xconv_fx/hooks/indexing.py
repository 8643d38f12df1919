"""Strides of index expressions without sympy's general simplification.

Inductor's C++ backend asks for the stride of every load and store in every loop variable, when it chooses what to tile
and again for every kernel it writes, and passes each through `sympy.simplify`. The indices of packed codes are sums of
quotients and remainders, on which that takes some 25 ms each: half of all code generation. What it is asked for is a
difference of two nearly equal expressions, which cancels when it is expanded. Where quotients or remainders are left,
`simplify` finds no more than that; an index that is left too complicated is not vectorised, never wrong.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from .stride_home import stride_home


@contextlib.contextmanager
def cheap_strides(enabled: bool = True) -> Iterator[None]:
    """While active, Inductor's strides of index expressions are found by expansion."""
    if not enabled:
        yield
        return
    from torch._inductor.codegen import cpp

    home = stride_home()

    def stride_at_vec_range(index: Any, var: Any, vec_length: int | None = None) -> Any:
        return _stride(_in_vector(index, var, vec_length) if vec_length else index, var)

    with (
        mock.patch.object(home, "stride_at", _stride),
        mock.patch.object(home, "stride_at_vec_range", stride_at_vec_range),
        mock.patch.object(cpp, "stride_at_vec_range", stride_at_vec_range),
    ):
        yield


@functools.lru_cache(maxsize=1 << 14)
def _stride(index: Any, var: Any) -> Any:
    """What the index grows by when `var` grows by one: a number, or an expression that varies."""
    import sympy

    if not index.has(var):
        return sympy.S.Zero
    return sympy.expand(index.xreplace({var: var + 1}) - index)


@functools.lru_cache(maxsize=1 << 14)
def _in_vector(index: Any, var: Any, length: int) -> Any:
    """The index for `length` consecutive values of `var` that begin at a multiple of it.

    Quotients by a multiple of the length are constants there, and remainders of a multiple of it grow as `var` does;
    free symbols stand for both.
    """
    import sympy
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    free: dict[Any, Any] = {}
    for part in sorted(index.atoms(FloorDiv, ModularIndexing), key=str):
        if part.args[0] != var or not all(argument.is_Integer for argument in part.args[1:]):
            continue
        divisor = part.args[1]
        symbol = sympy.Symbol(f"{var}_c{len(free)}", integer=True)
        if divisor % length == 0:
            free[part] = symbol
        elif isinstance(part, ModularIndexing) and divisor == 1 and part.args[2] % length == 0:
            free[part] = var + symbol
    return _in_vector(index.xreplace(free), var, length) if free else index
