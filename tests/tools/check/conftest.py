"""Records to compare: those of a network with a convolution, an activation and a head, without planning anything."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xconv_fx.tools.check.record import Held, Record

ROWS = (
    Held("stem", "convolution", "4x8x16x16", "float32", "keep", "norm", 32768, 32768, "/src/net.py:7"),
    Held("act", "relu", "4x8x16x16", "float32", "bitmask", "mask", 32768, 1024, "/src/net.py:8"),
    Held("", "cat", "4x16x16x16", "float32", "quantize:4", "weight_grad", 65536, 8448, "/src/net.py:9"),
)
LAYERS = {"stem": "Conv2d(3, 8, kernel_size=(3, 3))", "act": "ReLU()"}


@pytest.fixture
def record() -> Record:
    """A record of two layers and three residuals."""
    step = {"target": "net.py:build", "inputs": ["4x3x16x16"]}
    return Record(step, 1000_000, 2000_000, 800_000, 5000, 0.01, 1e-3, 1, "convolution_backward", LAYERS, ROWS)


@pytest.fixture
def worse(record: Record) -> Record:
    """The same with another activation: it reads the stem's result nonlinearly, and its own can only be kept."""
    stem, act, cat = record.residuals
    rows = (replace(stem, uses="nonlinear norm"), replace(act, operation="silu", codec="keep", held=32768), cat)
    return replace(record, lowest=900_000, layers={**record.layers, "act": "SiLU()"}, residuals=rows)
