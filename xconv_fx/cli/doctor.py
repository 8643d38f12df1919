"""`xconv doctor`: what works on this machine, and what to type about the rest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from rich.console import Console

from .arguments import FAILED, OK

BROKEN = 1


def add(commands: Any) -> argparse.ArgumentParser:
    doctor: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="say what works on this machine and what does not",
        description="Look at versions, private hooks, compiler and devices, make a plan and train a step.",
        epilog=f"exit codes: {OK} everything that this machine has works, {BROKEN} something is broken, "
        f"{FAILED} usage error",
    )
    doctor.add_argument("--quick", action="store_true", help="leave the training step out, which compiles for seconds")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON and nothing else")
    return doctor


def run(arguments: argparse.Namespace) -> int:
    from xconv_fx.tools import doctor

    findings = doctor.examine(train=not arguments.quick, debug=arguments.debug)
    broken = any(finding.status == doctor.BROKEN for finding in findings)
    if arguments.json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        sys.stdout.write(json.dumps({"works": not broken, "findings": listed}, indent=2) + "\n")
    else:
        Console().print(doctor.render(findings))
    return BROKEN if broken else OK
