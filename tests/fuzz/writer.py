"""Writes a network's program, and runs each line as it is written.

A piece of a network knows neither how many channels reach it nor how large its images are: it asks the writer, which
has run everything before it on a small tensor. So pieces can be drawn, dropped and put together in any order, and one
that does not fit what reaches it (`Misfit`) is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# More elements of one sample would make cases slow, not different.
LARGEST = 60_000


class Misfit(Exception):
    """This piece cannot follow what is before it."""


class Writer:
    """The lines of `__init__`, of `forward` and of further methods, and the values that they have on a sample."""

    def __init__(self, dims: int, inputs: dict[str, Tensor], names: dict[str, Any]) -> None:
        self.dims = dims
        self.init: list[str] = []
        self.lines: list[str] = []
        self.methods: list[list[str]] = []
        self.module = nn.Module()
        self.values: dict[str, Any] = {name: value.clone() for name, value in inputs.items()}
        self.names = {"torch": torch, "nn": nn, "F": F, "checkpoint": checkpoint, **names}
        self.count = 0

    @property
    def x(self) -> Tensor:
        return self.values["x"]

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def spatial(self) -> tuple[int, ...]:
        return tuple(self.x.shape[2:])

    def require(self, holds: bool) -> None:
        """Raise `Misfit` unless this holds."""
        if not holds:
            raise Misfit

    def name(self, kind: str) -> str:
        """A new name for an attribute or a variable."""
        self.count += 1
        return f"{kind}{self.count}"

    def attribute(self, kind: str, value: str) -> str:
        """Write `self.name = value`; the name, with its `self.`."""
        name = self.name(kind)
        self._register(f"self.{name} = {value}")
        return f"self.{name}"

    def buffer(self, kind: str, value: str) -> str:
        """Write a buffer of this value; its name, with `self.`."""
        name = self.name(kind)
        self._register(f'self.register_buffer("{name}", {value})')
        return f"self.{name}"

    def _register(self, line: str) -> None:
        self._run(line)
        self.init.append(line)

    def layer(self, kind: str, value: str) -> None:
        """Write a layer and `x = layer(x)`."""
        self.line(f"x = {self.attribute(kind, value)}(x)")

    def line(self, line: str) -> None:
        """Write a line of `forward`, and run it."""
        self._run(line)
        self.lines.append(line)
        self.require(self.x.dim() > 1 and self.x[0].numel() <= LARGEST and self.x.numel() > 0)

    def _run(self, line: str) -> None:
        try:
            with torch.no_grad():
                exec(line, self.names | {"self": self.module}, self.values)
        except Misfit:
            raise
        except Exception as error:  # Whatever torch says of a kernel larger than its image.
            raise Misfit(str(error)) from error

    @contextlib.contextmanager
    def method(self) -> Iterator[str]:
        """What is written inside becomes a method of `x`, whose name this gives."""
        name, outer = self.name("part"), self.lines
        self.lines = []
        try:
            yield name
            self.methods.append([f"def {name}(self, x):", *(f"    {line}" for line in self.lines), "    return x"])
        finally:
            self.lines = outer
