"""Where Inductor keeps its strides of index expressions: a module of its own, but in torch 2.12 the C++ backend's."""

from __future__ import annotations

import types


def stride_home() -> types.ModuleType:
    """The module of which `stride_at` and `stride_at_vec_range` are."""
    from torch._inductor import sizevars
    from torch._inductor.codegen import cpp

    return sizevars if hasattr(sizevars, "stride_at") else cpp
