"""Blocks of the CUDA caching allocator, by the constants in torch's header."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from xconv_fx.cost_model import allocator
from xconv_fx.cost_model.allocator import MIB, block_bytes


@pytest.mark.parametrize(
    ("constant", "ours"),
    [
        ("kMinBlockSize", allocator.ROUNDING),
        ("kSmallSize", allocator.SMALL),
        ("kSmallBuffer", allocator.SMALL_SEGMENT),
        ("kMinLargeAlloc", allocator.OWN_SEGMENT),
        ("kRoundLarge", allocator.SEGMENT_ROUNDING),
    ],
)
def test_the_constants_are_torchs(constant, ours):
    header = Path(torch.__path__[0], "include/c10/core/AllocatorConfig.h").read_text()
    found = re.search(rf"{constant} = (\d+);", header)
    assert found is not None and int(found[1]) == ours


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (0, 0),
        (1, 512),
        (512, 512),
        (513, 1024),
        (5 * MIB + 1, 5 * MIB + 512),
        (10 * MIB, 10 * MIB),
        # What remains of a segment of 12 MiB is split off if it is more than 1 MiB.
        (10 * MIB + 512, 10 * MIB + 512),
        (11 * MIB, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512),
        (12 * MIB, 12 * MIB),
    ],
)
def test_blocks(size, block):
    assert block_bytes(size) == block


def test_blocks_are_never_smaller():
    sizes = [7919 * number for number in range(5000)]
    assert all(0 <= block_bytes(size) - size <= MIB + 512 for size in sizes)
