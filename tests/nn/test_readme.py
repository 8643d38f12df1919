"""The example of the README prints what the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
README = Path(__file__).parents[2] / "README.md"


def test_the_example_without_torch_compile():
    section = README.read_text().partition("## Without torch.compile\n")[2].partition("\n## ")[0]
    program, output = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True, env=ENVIRONMENT)
    assert [line.rstrip() for line in ran.stdout.strip("\n").splitlines() if line.strip()] == [
        line for line in output.splitlines() if line
    ]
