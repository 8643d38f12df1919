"""The `xconv_fx` logger, and how a finished plan reaches the people watching.

torch's log settings take any importable module, so `TORCH_LOGS="xconv_fx"` shows every plan as a table and
`TORCH_LOGS="+xconv_fx"` also the debug messages; Python's own `logging` settings work as well. `TORCH_TRACE` gets the
plan as a JSON artifact, which tlparse lists under the compile it belongs to.

torch imports this package while it reads `TORCH_LOGS`, at the end of its own import. Modules that torch's search
imports on the way, which are the packages' `__init__` files, therefore must not import torch themselves.
"""

from __future__ import annotations

import logging

from xconv_fx.hooks.trace import artifact

from . import Plan
from .report import as_text

log = logging.getLogger("xconv_fx")

WIDTH = 120


def publish(plan: Plan) -> None:
    """Log `plan` as a table at INFO and hand it to torch's structured trace; costs nothing when nobody listens."""
    if log.isEnabledFor(logging.INFO):
        log.info("%s", as_text(plan, width=WIDTH))
    artifact("xconv_plan", plan.to_json, "json")
