"""The pytest plugin, in a pytest of its own: budgets that hold and that do not, mistakes, workers, and no cost."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

SUITE = """
import pytest, torch

@pytest.fixture
def held():
    return torch.zeros(1000, 1000)

@pytest.mark.xconv_budget("5MB")
def test_fits(held):
    pass

@pytest.mark.xconv_budget("5MB", device="cpu")
def test_over(held):
    grown = held.exp()

@pytest.mark.xconv_budget("1MB", lines=False)
class TestClass:
    def test_nothing(self):
        pass

@pytest.mark.xconv_budget("5MB")
def test_own_failure(held):
    held.exp()
    assert held is None

def test_fixture(memory_budget, held):
    with memory_budget("9MB", held) as recording:
        held.exp()
    assert recording.peak.bytes == 8_000_000
    with memory_budget("3MB"):
        held.cos()

@pytest.mark.xconv_budget("1GB")
def test_both(memory_budget):
    pass

@pytest.mark.xconv_budget("1GB", device="quantum")
def test_device():
    pass
"""


def run(folder, *arguments: str, source: str = SUITE) -> tuple[int, str]:
    """Exit code and output of pytest on a suite."""
    (folder / "test_suite.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "-q", *arguments]
    # A worker of xdist must not make one of the pytest that it starts.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["COLUMNS"] = "200"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_budgets(tmp_path, workers):
    code, out = run(tmp_path, *workers, "-rA", "-W", "error")
    assert code == 1
    outcomes = dict(re.findall(r"^(?:PASSED|FAILED|ERROR) test_suite.py::(\S+)(?: - (.*))?$", out, re.MULTILINE))
    assert outcomes["test_fits"] == "" and outcomes["TestClass::test_nothing"] == ""
    assert "peak 8.00 MB is 3.00 MB over the budget of 5.00 MB; alive at the peak:\n  4.00 MB  there before\n" in out
    assert "  4.00 MB  aten::exp  test_suite.py:14 (test_over)" in out
    # The failure of a test itself is not hidden behind its memory.
    assert "assert tensor(" in outcomes["test_own_failure"]
    assert "peak 4.00 MB is 1.00 MB over the budget of 3.00 MB" in out
    assert "  4.00 MB  aten::cos  test_suite.py:31 (test_fixture)" in out
    assert "not both" in outcomes["test_both"]
    assert "device='quantum'" in outcomes["test_device"]


MISTAKES = [
    ('"lots"', "test_suite.py::test_it: xconv_budget='lots': not a size; write a number of bytes"),
    ("", 'test_suite.py::test_it: xconv_budget takes one size; write @pytest.mark.xconv_budget("1.5GB")'),
    ('"1GB", devcie="cpu"', "test_suite.py::test_it: xconv_budget takes one size"),
]


@pytest.mark.parametrize(("written", "told"), MISTAKES)
def test_mistakes_end_the_run_with_a_usage_error(tmp_path, written, told):
    source = f"import pytest\n@pytest.mark.xconv_budget({written})\ndef test_it(): pass\n"
    code, out = run(tmp_path, source=source)
    assert code == pytest.ExitCode.USAGE_ERROR and f"ERROR: {told}" in out
    assert "Traceback" not in out


def test_a_mistake_fails_its_test_under_xdist(tmp_path):
    source = 'import pytest\n@pytest.mark.xconv_budget("lots")\ndef test_it(): pass\n'
    code, out = run(tmp_path, "-n", "1", source=source)
    assert code == 1 and "xconv_budget='lots': not a size" in out and "INTERNALERROR" not in out


def test_unused_it_imports_nothing(tmp_path):
    source = "import sys\ndef test_it():\n    assert not {'torch', 'numpy', 'rich'} & sys.modules.keys()\n"
    code, out = run(tmp_path, source=source)
    assert code == 0, out
    assert "xconv_budget(size, device=None, lines=True): fail" in run(tmp_path, "--markers", source=source)[1]
