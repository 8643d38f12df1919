"""What stands for the sources in keys of caches changes with every one of them."""

from __future__ import annotations

from pathlib import Path

import xconv_fx
from xconv_fx import cost_model, passes
from xconv_fx.fingerprint import hash_of, source_hash


def test_every_source_file_is_part_of_the_hash(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    empty = hash_of([tmp_path])
    (tmp_path / "new_pass.py").write_text("x = 1\n")
    added = hash_of([tmp_path])
    (tmp_path / "new_pass.py").write_text("x = 2\n")
    assert len({empty, added, hash_of([tmp_path])}) == 3


def test_all_of_the_package_is():
    homes = {Path(package.__file__).parent for package in (xconv_fx, cost_model, passes)}
    assert source_hash() == hash_of(homes) != hash_of(list(homes)[:2])
