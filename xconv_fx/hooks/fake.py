"""Running operations on tensors without memory, where some are expected to fail.

Checked on torch 2.13.0.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch


@contextlib.contextmanager
def trying_fake(values: Sequence[Any]) -> Iterator[None]:
    """Inside, tensors are fake, in the mode of those given; operations that fail raise, and are not logged."""
    mode = torch._guards.detect_fake_mode(list(values)) or torch._subclasses.FakeTensorMode()
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        with mode:
            yield
    finally:
        logger.disabled = disabled
