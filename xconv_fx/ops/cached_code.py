"""Code that torch's compilers keep on disk and that calls our operators is of one version of these operators.

Inductor and AOTAutograd know an operator by its name alone: after an update they would serve code that calls it with
the arguments of before, and backwards by its former formula. This package's backend has its sources in its keys, and
torch's version is in all of them; eager layers may be compiled by any backend. So the sources are put into the tag that
torch adds to every key of its caches.

Known gap: a user who sets `torch.compiler.config.cache_key_tag` after the operators were defined takes that off.
"""

from __future__ import annotations

import torch.compiler.config

from xconv_fx.fingerprint import source_hash


def tag_cached_code() -> None:
    """Have what is compiled in this process from now on found again by these sources alone."""
    mark = f"xconv-fx {source_hash()}"
    given = torch.compiler.config.cache_key_tag
    if mark not in given:
        torch.compiler.config.cache_key_tag = f"{given} {mark}".strip()
