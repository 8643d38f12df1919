"""A process for what must not happen in that of the tests: a fake CUDA device, Triton's interpreter.

`Worker.call("module:function", *arguments)` runs a function there and gives its result, or raises what it raised. Both
are pickled. The process imports torch once, for all calls; it prints to standard error.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parents[2]


class Worker:
    """A process that is started by its first call and ended by `close`.

    `shim` is loaded first of all, if one is given; `environment` is set besides what is inherited, and `folder` is for
    the caches of Inductor, Triton and this package.
    """

    def __init__(self, folder: Path, shim: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self.shim, self.environment = folder, shim, dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, function: str, *arguments: Any) -> Any:
        """The result of `function`, "module:name", there. Raises `RuntimeError` with the traceback of its error."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        pickle.dump((function, arguments), process.stdin)
        process.stdin.flush()
        try:
            done, result = pickle.load(process.stdout)
        except EOFError:
            raise RuntimeError(f"{function}: its process ended with {process.wait()}") from None
        if not done:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.close()
            self.process.wait(60)
            self.process.stdout.close()
            self.process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(_TESTS), os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": "1",
                "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
                "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
                "TRITON_CACHE_DIR": str(self.folder / "triton"),
                "XCONV_FX_CACHE": str(self.folder / "xconv"),
                "XCONV_FX_PLAN_CACHE": "0",
                **self.environment,
            }
            start = f"from helpers.fake_cuda.worker import serve; serve({str(self.shim or '')!r})"
            command = [sys.executable, "-c", start]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=_TESTS
            )
        return self.process


def serve(shim: str) -> None:
    """Answer calls until there are no more."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if shim:
        from helpers.fake_cuda.shim import load

        load(Path(shim))
    while True:
        try:
            function, arguments = pickle.load(calls)
        except EOFError:
            return
        try:
            module, name = function.split(":")
            answer = True, getattr(importlib.import_module(module), name)(*arguments)
            pickled = pickle.dumps(answer)
        except Exception:
            pickled = pickle.dumps((False, traceback.format_exc()))
        answers.write(pickled)
        answers.flush()
