"""What Dynamo made dynamic, fixed to the sizes at hand.

Private parts of PyTorch, read in torch 2.13: `torch/fx/experimental/symbolic_shapes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xconv_fx.errors import UnsupportedModelError


def specialise(example_inputs: Sequence[Any]) -> None:
    """Fix every symbolic size to its value: a plan is made of bytes. Another size compiles another graph.

    A size that the user marked as dynamic is one of many, which get a plan each. Raises `UnsupportedModelError` for a
    size that no input has (`mark_unbacked`).
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    _allow_fixed_sizes(example_inputs)
    try:
        for value in example_inputs:
            if isinstance(value, torch.SymInt):
                int(value)
            elif isinstance(value, torch.Tensor):
                for size in (*value.shape, *value.stride()):
                    int(size)
    except GuardOnDataDependentSymNode as error:
        reason = f"it is not known when the graph is compiled ({error.cond}), and a plan is made of bytes"
        raise UnsupportedModelError("an input's size", reason, "drop mark_unbacked, or write mark_dynamic") from error


def _allow_fixed_sizes(example_inputs: Sequence[Any]) -> None:
    """Drop the demand of `mark_dynamic` that a size must not be fixed, which Dynamo checks when it makes guards."""
    mode = torch._guards.detect_fake_mode(list(example_inputs))
    tracked = None if mode is None or mode.shape_env is None else mode.shape_env.tracked_fakes
    for fake in tracked or ():
        for kind in ("constraint_sizes", "constraint_strides"):
            constraints = getattr(fake.symbolic_context, kind, None)
            if isinstance(constraints, list):
                constraints[:] = [None] * len(constraints)
