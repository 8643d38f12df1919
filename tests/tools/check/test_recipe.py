"""The workflow of `examples/ci`: its commands do what a pull request needs, in a project such as the example."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

EXAMPLE = Path(__file__).parents[3] / "examples" / "ci"


@pytest.fixture(scope="module")
def commands() -> list[str]:
    """What the workflow runs once everything is installed."""
    jobs = yaml.safe_load((EXAMPLE / "memory.yml").read_text())["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    return [line for line in lines if line.startswith("xconv ")]


def run(command: str, project: Path) -> subprocess.CompletedProcess[str]:
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join((scripts, os.environ["PATH"]))}
    return subprocess.run(command, shell=True, cwd=project, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="the workflow's commands are for a POSIX shell")
def test_the_workflow_passes_as_committed_and_fails_with_a_line_to_look_at(commands, tmp_path):
    github, junit = commands
    project = shutil.copytree(EXAMPLE, tmp_path / "project")
    (project / "xconv.toml").write_text((EXAMPLE / "xconv.toml").read_text().partition("[check.wide]")[0])
    lock = (project / "xconv.lock").read_text()
    (project / "xconv.lock").write_text(lock.partition(',\n    "wide"')[0] + "\n  }\n}\n")

    passed = run(github, project)
    assert passed.returncode == 0, passed.stderr

    source = project / "net.py"
    source.write_text(source.read_text().replace("width: int = 16", "width: int = 24"))
    failed = run(github, project)
    assert failed.returncode == 1
    assert "::error file=net.py,line=" in failed.stdout

    assert run(junit, project).returncode == 1
    suite = ElementTree.parse(project / "memory.xml").getroot()
    assert {case.get("name"): len(case.findall("failure")) for case in suite.iter("testcase")} == {"plain": 1}
