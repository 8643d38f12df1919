"""README's tables say what the records of the studies say, in processes of their own as in test_fidelity.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NETS = ("resnet", "vgg", "plain_unet2d", "plain_unet3d", "unet3d", "convnext")
OPTIONS = {"methods": None, "tiny": False}


def tables(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def row(name: str, family: str, peak: int, error: float | None = None, **known: object) -> dict[str, Any]:
    """What peers.py says of a method."""
    gradient = None
    if error is not None:
        first = {"whole": error, "worst": error, "worst_name": "weight"}
        gradient = {"first": first, "one": error, "mean": error, "bias": 1.0, "draws": 16}
    return {"method": {"name": name, "family": family}, "peak": peak, "gradient": gradient, **known}


def peers(net: str, **options: object) -> str:
    """A record of peers.py, in which the best exact peer took 80 MB."""
    rows = (
        row("inductor", "inductor", 100_000_000),
        row("checkpoint", "checkpoint", 80_000_000),
        row("xconv-lowest", "xconv", 36_040_000),
        row("xconv-exact", "xconv", 60_000_000),
        row("xconv65", "xconv", 64_000_000, 0.00123, slowdown=0.931),
        row("xconv@peer", "xconv", 79_000_000, peer_slowdown=0.858),
    )
    record = {"net": net, "shape": [2, 3, 8, 8], "rows": {each["method"]["name"]: each for each in rows}}
    return json.dumps({**record, "best_peer": "checkpoint", "options": {**OPTIONS, **options}}) + "\n"


def cost(seconds: float) -> dict[str, Any]:
    return {"parts": {"ours": seconds}, "traces": 1, "refused": ""}


def compiling(net: str, budget: str, cold: float, warm: float) -> str:
    """A record of compile_times.py, of three repeats."""
    seconds = {"cold": (cold, cold / 2, 9 * cold), "warm": (warm, warm / 2, 9 * warm)}
    record = {"net": net, "budget": budget, "commit": "abc", "torch": "2", "options": {"repeats": 3}}
    return json.dumps({**record, **{when: [cost(each) for each in taken] for when, taken in seconds.items()}}) + "\n"


def stepping(net: str, measured: tuple[float, ...]) -> str:
    """A record of first_step.py."""
    made_by = {"commit": "abc", "torch": "2", "options": {}}
    return json.dumps({"net": net, "seconds": 1.0, "measured": measured, "after": (1.0, 1.02, 1.01), **made_by}) + "\n"


def test_tables_are_what_the_records_say():
    done = tables("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_number_is_found_and_mended(tmp_path):
    text = (ROOT / "README.md").read_text()
    readme = tmp_path / "README.md"
    readme.write_text(text.replace("| segmentation2d, Dice | ", "| segmentation2d, Dice | 1"))
    done = tables("--check", "--readme", readme)
    assert done.returncode == 1 and "+| segmentation2d, Dice | 0" in done.stdout
    assert tables("--readme", readme).returncode == 0
    assert readme.read_text() == text


def test_methods_are_compared_once_all_networks_are_known(tmp_path):
    text = (ROOT / "README.md").read_text()
    readme, records = tmp_path / "README.md", tmp_path / "peers.jsonl"
    readme.write_text(text)
    # A comparison without what the table shows is no row.
    part = json.loads(peers(NETS[5]))
    del part["rows"]["xconv-exact"]
    records.write_text("".join(peers(net) for net in NETS[:5]) + json.dumps(part) + "\n")
    given = ("--readme", readme, "--records", tmp_path)
    assert tables("--check", *given).returncode == 0
    records.write_text(records.read_text() + peers(NETS[5]))
    assert tables(*given).returncode == 0
    assert (
        "| MONAI's 3D U-Net, 2x3x8x8 | 100.0 | 80.0 (checkpoint) | 60.0 (0.75) | 36.0 (0.45) | 0.86 | 0.93, 1.2e-03 |"
        in readme.read_text().splitlines()
    )


def test_costs_are_medians(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    budgets = {"inductor": (20, 8), "65%": (30, 8), "lowest": (40, 12)}
    lines = [compiling(net, budget, *taken) for net in NETS for budget, taken in budgets.items()]
    (tmp_path / "compile_times.jsonl").write_text("".join((*lines, compiling("vgg", "65%", 50, 16))))
    (tmp_path / "first_step.jsonl").write_text(stepping("vgg", (1.9, 1.8, 2.7)) + stepping("resnet", (2.0,)))
    assert tables("--readme", readme, "--records", tmp_path).returncode == 0
    written = readme.read_text().splitlines()
    assert "  | 65% | 1.5 to 2.5 | 1.0 to 2.0 |" in written
    assert "  | lowest, with the refusal that names it | 2.0 to 2.0 | 1.5 to 1.5 |" in written
    assert "| vgg | 1.90 | 1.01 |" in written


def test_every_table_has_its_place(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text().replace("readme_tables.py peers -->", "readme_tables.py -->"))
    done = tables("--check", "--readme", readme)
    assert done.returncode == 2 and "tables that there are: peers" in done.stderr
