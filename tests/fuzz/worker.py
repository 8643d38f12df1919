"""A process that runs cases: one line of JSON in for each, lines out for what it is doing and what it found.

Kernels are compiled cheaply, as their code is not what is under test: by the C++ compiler's first level of
optimisation, in this process, and for seven cases of eight without vector instructions, whose generation takes half of
Inductor's time. Buffers, their lifetimes and the order of kernels do not depend on either.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import tempfile
import time
from typing import Any

# Plans rest on the generic rates, whatever was measured on this machine.
os.environ.setdefault("XCONV_FX_CACHE", tempfile.mkdtemp())


def set_up() -> None:
    """One thread, no caches between cases, cheap kernels."""
    import torch
    from torch._inductor import config, cpp_builder

    torch.set_num_threads(1)
    config.compile_threads = 1
    config.fx_graph_cache = False
    gc.set_threshold(200_000, 50, 50)
    flags = cpp_builder._get_optimization_cflags

    def quick(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        compiler, linker = flags(*args, **kwargs)
        return ["O1" if flag == "O3" else flag for flag in compiler], linker

    cpp_builder._get_optimization_cflags = quick


def vectorised(number: int) -> None:
    """Whether this case's kernels use vector instructions."""
    from torch._inductor import config

    config.cpp.simdlen = None if number % 8 == 0 else 1


def main() -> None:
    """Serve until the input ends. What cases print goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    set_up()
    from .cases import Case
    from .oracles import check

    say(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        vectorised(asked["number"])
        start, used = time.time(), _cpu()
        verdict = check(Case.from_json(asked["case"]), lambda stage: say(stage=stage), asked["interpret"])
        say(kind=verdict.kind, detail=verdict.detail, seen=verdict.seen, seconds=round(time.time() - start, 1),
            cpu=round(_cpu() - used, 1))  # fmt: skip
        gc.collect()


def _cpu() -> float:
    """Seconds of processor time, the compilers' included."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main()
