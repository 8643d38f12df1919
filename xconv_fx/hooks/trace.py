"""torch's structured trace (`TORCH_TRACE`), which tlparse reads.

Private parts of PyTorch, read in torch 2.13: `torch._logging.trace_structured` and the logger behind it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch._logging import trace_structured
from torch._logging._internal import trace_log


def listening() -> bool:
    """Whether anybody reads the trace."""
    return bool(trace_log.handlers)


def artifact(name: str, payload: Callable[[], str], encoding: str) -> None:
    """Add an artifact to the trace of the compilation that goes on; without a trace, `payload` is not called."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )
