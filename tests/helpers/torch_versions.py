"""What is not the same on every version of torch that the package runs on, where a test would see it."""

from __future__ import annotations

import pytest
import torch

from xconv_fx.hooks.version import minor

BEFORE_2_13 = minor(torch.__version__) < (2, 13)

# `fallback_random` reaches RReLU from 2.13 on.
needs_eager_rrelu = pytest.mark.skipif(BEFORE_2_13, reason="Inductor 2.12 draws the slopes of RReLU in its own way")
needs_text_of_2_13 = pytest.mark.skipif(BEFORE_2_13, reason="the gradient of SiLU is written with other operators")
