"""Cases of the fuzzer that are run every time: what they cover is printed by `benchmarks/fuzz.py --only`.

Most are interpreted; of a few the code is generated, audited and measured. A number is added when what it found is
mended.
"""

from __future__ import annotations

import pytest
from helpers.torch_versions import needs_eager_rrelu

from .cases import draw_case
from .oracles import check

# fmt: off
INTERPRETED = [
    5, 6, 7, 9, 11, 14, 15, 18, 19, 21, 22, 23, 25, 26, 27, 29, 30, 31, 34, 37, 39, 41, 42, 43, 45,
    46, 47, 50, 53, 57, 59, 24, 142, 263, 312, 338, 556, 705, 772,
]
# fmt: on
COMPILED = [2, 3]
# These draw the slopes of an RReLU.
RRELU = {30, 47, 338}


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=needs_eager_rrelu if number in RRELU else ()) for number in INTERPRETED]
)
@pytest.mark.filterwarnings("default")
def test_an_interpreted_case_is_right(number):
    verdict = check(draw_case(0, number), interpret=True)
    assert verdict.kind in ("ok", "refused"), verdict.detail


@pytest.mark.parametrize("number", COMPILED)
@pytest.mark.filterwarnings("default")
def test_a_compiled_case_is_right(number):
    verdict = check(draw_case(0, number))
    assert verdict.kind in ("ok", "refused"), verdict.detail
