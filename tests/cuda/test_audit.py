"""The audit of generated CUDA code against the plan that the code is of: both count blocks and workspaces alike."""

from __future__ import annotations

import pytest
from helpers.fake_cuda import FakeCuda
from helpers.fake_cuda.cases import CHOSEN
from helpers.fake_cuda.records import Case

# How far a predicted peak may be from the audited one. In fixed point a kernel of the small 3D network's backward
# writes one buffer more than the planner foresees.
CLOSE, CLOSE_FIXED = 0.03, 0.04
CASES = [case for case in CHOSEN if case.net != "128"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_peaks_are_predicted(cuda: FakeCuda, case: Case) -> None:
    generated = cuda.generate(case)
    predicted, audited = max(generated.predicted.values()), max(generated.audited.values())
    close = CLOSE_FIXED if case.force is not None and case.force.codec == "fixed" else CLOSE
    assert predicted == pytest.approx(audited, rel=close), (generated.predicted, generated.audited)
