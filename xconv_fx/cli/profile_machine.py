"""`xconv profile-machine`: measure the machine that plans predict times for (`xconv_fx.tools.profile_machine`)."""

from __future__ import annotations

import argparse
import re
from typing import Any

from xconv_fx.errors import UsageError

from .arguments import FAILED, OK

# Of `cost_model/device.py`, whose package imports too much for `xconv --help`.
DEVICES = ("cpu", "cuda")


def add(commands: Any) -> argparse.ArgumentParser:
    profile: argparse.ArgumentParser = commands.add_parser(
        "profile-machine",
        help="measure this machine once, so that later plans predict its times",
        description="Measure bandwidth, convolutions and the start of kernels here, and keep them for later plans.",
        epilog=f"exit codes: {OK} measured and kept, {FAILED} usage error, or the numbers cannot be kept",
    )
    add = profile.add_argument
    add("--device", choices=DEVICES, help="what to measure (default: cuda where there is one, else cpu)")
    add(
        "--threads",
        metavar="N",
        help="threads of the CPU; plans for another number use other numbers (default: torch's)",
    )
    add("--json", action="store_true", help="print the numbers as JSON and nothing else")
    return profile


def run(arguments: argparse.Namespace) -> int:
    threads = arguments.threads
    if threads is not None and not re.fullmatch(r"[1-9]\d{0,3}", threads):
        raise UsageError(f"--threads {threads!r} is not a number of threads", "--threads 4")

    import torch

    from xconv_fx.tools.profile_machine import profile

    kind = arguments.device or ("cuda" if torch.cuda.is_available() and threads is None else "cpu")
    profile(kind, None if threads is None else int(threads), arguments.json)
    return OK
