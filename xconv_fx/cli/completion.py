"""`xconv completion`: the script by which a shell completes commands, options and files."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .arguments import FAILED, OK

SHELLS = ("bash", "zsh", "tcsh")
EXAMPLES = f"""\
exit codes: {OK} printed, {FAILED} usage error

examples:
  eval "$(xconv completion bash)"                                  now, in this shell
  xconv completion bash > ~/.local/share/bash-completion/completions/xconv
  xconv completion zsh > ~/.zfunc/_xconv                           with ~/.zfunc in fpath
"""


def add(commands: Any) -> argparse.ArgumentParser:
    completion: argparse.ArgumentParser = commands.add_parser(
        "completion",
        help="print the script for a shell's tab completion",
        description="Print the script by which a shell completes commands, options and files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=SHELLS, help="the shell that is to complete")
    return completion


def run(arguments: argparse.Namespace) -> int:
    import shtab

    from . import parser

    sys.stdout.write(shtab.complete(parser(), arguments.shell))
    return OK
