"""CUDA code without a GPU: the backend on a device that is not there, and its kernels in Triton's interpreter.

`FakeCuda` is what tests and benchmarks use. It shows what is generated, and what the kernels compute. Of the rest it
shows nothing: launches, races, speed, contraction of multiplications and additions, flushed denormals, approximate
division, what cuDNN chooses, and CUDA graphs that are captured.

Known gap: all of it leans on private parts of torch and Triton, so other versions than the checked ones are refused.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import shim
from .worker import Worker

if TYPE_CHECKING:
    from .interpreter import Interpreted
    from .records import Case, Cubin, Generated
    from .units import Unit


class FakeCuda:
    """A device that is not there, with a folder in which every answer is kept."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.device = Worker(folder, shim.build(folder))
        self.interpreter = Worker(folder, environment={"TRITON_INTERPRET": "1"})

    def __enter__(self) -> FakeCuda:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        self.device.close()
        self.interpreter.close()

    def generate(self, case: Case) -> Generated:
        """Plan, audit and code of a case. Raises `RuntimeError` with what the backend raised."""
        return self._kept(self.device, "generate:generate", case)  # type: ignore[no-any-return]

    def cubins(self, code: str, capabilities: Sequence[int]) -> list[Cubin]:
        """The kernels of a wrapper, compiled for these compute capabilities."""
        return self._kept(  # type: ignore[no-any-return]
            self.device, "cubins:cubins", code, tuple(capabilities), str(self.folder / "kernels")
        )

    def interpret(self, generated: Generated) -> Interpreted:
        """What the kernels of a step compute, against its graphs."""
        arguments = generated.halves, generated.results, str(self.folder / "interpreted")
        return self._kept(self.interpreter, "interpreter:interpret", *arguments)  # type: ignore[no-any-return]

    def unit(self, unit: Unit) -> Interpreted:
        """What the kernels of an operator alone compute, against the operator."""
        half = self._kept(self.device, "units:generate", unit)
        return self._kept(  # type: ignore[no-any-return]
            self.interpreter, "units:interpret", unit, half, str(self.folder / "interpreted")
        )

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of this package, "module:name", gives where the device is."""
        return self._kept(self.device, function, *arguments)

    def interpret_call(self, function: str, *arguments: Any) -> Any:
        """What a function of this package gives where kernels are interpreted."""
        return self._kept(self.interpreter, function, *arguments)

    def _kept(self, worker: Worker, function: str, *arguments: Any) -> Any:
        """An answer of a worker; other processes of the same test run find it."""
        asked = pickle.dumps((function, arguments))
        path = self.folder / f"{hashlib.sha256(asked).hexdigest()[:24]}.pickle"
        return _found(path, lambda: worker.call(f"helpers.fake_cuda.{function}", *arguments))


def _found(path: Path, make: Callable[[], Any]) -> Any:
    if not path.exists():
        made = path.with_suffix(f".{os.getpid()}")
        made.write_bytes(pickle.dumps(make()))
        made.replace(path)
    return pickle.loads(path.read_bytes())
