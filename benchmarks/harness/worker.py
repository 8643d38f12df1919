"""Processes of their own: for one method of training, which does what it is asked, and for one function.

The caller decides who computes when, a method that crashes takes nothing else with it, and what one method compiled or
configured cannot help or harm another: each process has an empty cache directory of Inductor's and its own settings.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from xconv_fx.errors import BudgetInfeasibleError

T = TypeVar("T")


class MethodError(RuntimeError):
    """A method does not work on a network. `smallest` is set if all that is wrong is a budget that is too small."""

    def __init__(self, message: str, smallest: int | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


def serve(pipe: Connection, make: Callable[[], Any], threads: int, compiled: bool) -> None:
    """A worker's life: make the subject, then call those of its methods that are asked for until told to stop."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        subject: Any = None
        while (request := _receive(pipe)) is not None:
            name, arguments = request
            try:
                if subject is None:
                    _warm_up(compiled)
                    subject = make()
                pipe.send((getattr(subject, name)(*arguments), None))
            except BudgetInfeasibleError as error:
                pipe.send((None, (str(error).splitlines()[0], error.smallest)))
            except Exception as error:
                pipe.send((None, (_first_line(error), None)))


def _receive(pipe: Connection) -> Any:
    """The next request; None when whoever sent them is gone."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def _warm_up(compiled: bool) -> None:
    """Pay for imports and precompiled headers before the first step is timed."""
    # Past the limit Dynamo would run the rest uncompiled, and the row would be about something else.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if not compiled:
        return
    from torch._inductor import config as inductor

    import xconv_fx.step.backend  # noqa: F401

    inductor.compile_threads = 1
    values = torch.ones(8, requires_grad=True)
    torch.compile(lambda x: x.sin() * 2)(values).sum().backward()
    torch.compiler.reset()


def _first_line(error: Exception) -> str:
    """Type and message. Dynamo names the error that it wraps in a line of its own, after a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    message = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {message}"[:240]


class Worker:
    """A process that holds what `make` returns and calls its methods on request.

    `make` is pickled, so it is a function of a module with its arguments. Nothing is computed before the first request.
    Raises `MethodError` for whatever goes wrong in the process, or when an answer takes longer than `timeout` seconds.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        name: str,
        threads: int = 1,
        timeout: float = 3600,
        compiled: bool = True,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.timeout = timeout
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, threads, compiled), name=name)
        self._process.start()
        theirs.close()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the worker's subject and wait for what it returns."""
        try:
            self._pipe.send((name, arguments))
            if not self._pipe.poll(self.timeout):
                self._process.kill()
                raise MethodError(f"no answer within {self.timeout:.0f} s")
            result, problem = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise MethodError(f"the process died with exit code {self._process.exitcode}") from None
        if problem is not None:
            raise MethodError(*problem)
        return result

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
        self._pipe.close()


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """What the function returns in a process of its own, from which no memory and no compiled code is carried on."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
