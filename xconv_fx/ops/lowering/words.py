"""Loops over packed words, for the codecs' lowerings: codes into int32 words, and codes out of them.

See `layout.Packing` for the arrangement. Private APIs of Inductor as in `loops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
import torch
from torch._inductor import ir
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from .. import layout
from . import loops
from .loops import Index, Value


def packed(
    like: ir.TensorBox,
    plan: layout.Packing,
    value: Callable[[Index, sympy.Expr], Value],
    coder: Callable[[Sequence[sympy.Expr], Index], Callable[[Value, int], Value]] = lambda rows, inner: lambda x, at: x,
    joined: int = 1,
) -> ir.TensorBox:
    """Words of codes below 2**bits.

    `coder(rows, inner index)` prepares what the elements of a run of rows have in common; what it returns makes a code
    out of `value(physical index, row)` and the number of the row in the run. Codes are int32, or with `joined` above 1
    float32, of which that many become the digits of one number (below 2**24) before it is converted to int32.
    """
    leading = plan.physical[: plan.split]
    run = min(plan.per_word, layout.UNROLLED_TERMS)
    runs = plan.per_word // run

    def body(index: Index, within: Index) -> Value:
        first = index[0] * plan.per_word + within[0] * run
        rows = [first + place for place in range(run)]
        code = coder(rows, index[1:])

        def digit(place: int) -> Value:
            largest = (plan.words[0] - 1) * plan.per_word + (runs - 1) * run + place
            row = loops.at_most(rows[place], plan.rows - 1, largest)
            return code(value([*loops.unravel(row, leading), *index[1:]], row), place)

        word = None
        for place in reversed(range(0, run, joined)):
            part = _number([digit(at) for at in range(place, place + joined)], plan.bits)
            shift = ops.constant(plan.bits * joined, torch.int32)
            word = ops.bitwise_or(ops.bitwise_left_shift(word, shift), part) if word else part
        shift = ops.index_expr(within[0] * (run * plan.bits), torch.int32)
        return ops.bitwise_left_shift(word, shift) if runs > 1 else word

    # Runs of one word share no bit: their sum is their union. A loop over runs is compiled faster than all of them.
    return loops.summed(like, torch.int32, body, plan.words, [runs])


def _number(digits: Sequence[Value], bits: int) -> Value:
    """The int32 with these float32 digits, the lowest first; a single digit as it is."""
    total = digits[-1]
    for digit in reversed(digits[:-1]):
        total = ops.add(ops.mul(total, ops.constant(float(1 << bits), torch.float32)), digit)
    return ops.to_dtype(total, torch.int32) if len(digits) > 1 else total


def unpacked(words: ir.TensorBox, plan: layout.Packing) -> Callable[[Index], Value]:
    load = loops.word_loader(words)
    leading = plan.physical[: plan.split]

    def code(index: Index) -> Value:
        row = loops.linear(index[: plan.split], leading)
        word = load([FloorDiv(row, plan.per_word), *index[plan.split :]])
        place = ops.index_expr(ModularIndexing(row, 1, plan.per_word) * plan.bits, torch.int32)
        return ops.bitwise_and(ops.bitwise_right_shift(word, place), ops.constant((1 << plan.bits) - 1, torch.int32))

    return code


def counted_as_load(
    words: ir.TensorBox, plan: layout.Packing, body: Callable[[Index], Value]
) -> Callable[[Index], Value]:
    """`body(physical index)`, the value of a code; for a GPU, Inductor counts it as the load of its word.

    It counts loads and operations to decide what gets a buffer. A code that is decoded from a table has many of both,
    all of which are cheap: what is made of it would be stored, in float32, where what is made of the tensor is not.
    """
    if words.get_device_or_error().type == "cpu":
        return body
    load, leading = words.make_loader(), plan.physical[: plan.split]

    def counted(index: Index) -> Value:
        if type(V.get_ops_handler()).__name__ != "OpCounterCSE":
            return body(index)
        return load([FloorDiv(loops.linear(index[: plan.split], leading), plan.per_word), *index[plan.split :]])

    return counted
