"""Share bits out: one width for every residual, so that the average meets a target with the least gradient variance.

ActNN (Chen et al., ICML 2021, section 4.2) minimises sum_l w_l / (2**b_l - 1)**2 over layers with weights from their
sensitivities, subject to a total of bits. Here each width comes with the noise that its codec predicts times the
sensitivity, so that ranges, sparse values and one-bit codes are accounted for as they are, and a residual may have no
bits of its own where it can be made again from the codes of another. It is the planning problem with a single step, a
total of bits in the place of the budget, and the same solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .memory import Item, Problem
from .solver import solve


def share_bits(
    items: Sequence[Item],
    bits: Sequence[Sequence[int | None]],
    total: int,
    *,
    time_limit: float = 2.0,
    nodes: int | None = None,
) -> tuple[int, ...]:
    """The option of every item, of least noise, with at most `total` bits together.

    `bits[i][o]` is what option o of item i takes; None strikes it out. `time_limit` (seconds) and `nodes` bound the
    search as in `solve`. Raises `Infeasible` when the least widths take more.
    """
    weighed = tuple(
        Item(item.name, tuple(
            replace(option, loads=((0, 0, total + 1 if taken is None else taken),), time=0.0)
            for option, taken in zip(item.options, row, strict=True)
        ))
        for item, row in zip(items, bits, strict=True)
    )  # fmt: skip
    return solve(Problem((0,), weighed), total, time_limit=time_limit, nodes=nodes).choice
