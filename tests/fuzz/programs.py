"""A case as a program: what is run, and what a person gets who wants to see it fail.

The text defines `Model`, `inputs(step)`, `loss(result, step)` and `OPTIONS`; the oracles run it, and `standalone` adds
a main part that compares one step with plain autograd by torch alone.
"""

from __future__ import annotations

import pprint
import textwrap
from typing import Any

import torch

from .cases import LOSSES, SECOND, Case
from .networks import HELPERS, write_if_fits
from .writer import Misfit, Writer

DTYPES = {"float64": "torch.float64", "bfloat16": "torch.bfloat16"}

HEAD = '''import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

B, C, SIZE = {batch}, {channels}, {size}
OPTIONS = {options}
{helpers}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
{init}

{methods}    def forward(self, {arguments}):
{forward}


def inputs(step, B=B):
    torch.manual_seed(1000 + step)
    return [{inputs}]


TARGETS = {{}}


def target(shape, step):
    """Made once and held, as a training loop does."""
    if (shape, step) not in TARGETS:
        TARGETS[shape, step] = torch.randn(shape, generator=torch.Generator().manual_seed(step))
    return TARGETS[shape, step]


def loss(result, step):
    y = {first}
    t = target(y.shape, step)
    return {loss}{more}
'''

MAIN = """

def step(call, net, number=0):
    net.zero_grad()
    given = inputs(number)
    torch.manual_seed(number)
    with torch.autocast("cpu", torch.bfloat16, enabled={autocast}):
        result = call(*given)
    loss(result, number).backward()
    return {{name: p.grad for name, p in net.named_parameters() if p.grad is not None}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, other = Model(), Model()
    other.load_state_dict(net.state_dict())
    compiled = torch.compile(other, backend="xconv", options={{**OPTIONS, "inductor": {{"fallback_random": True}}}})
    for number in range({steps}):
        wanted = step(net, net, number)
        found = step(compiled, other, number)
        for name in wanted:
            off = (found[name] - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-12)
            print(number, name, f"{{off:.1e}}")
"""


class Program:
    """The text of a case, and the numbers of those of its pieces that fit. Raises `Misfit` where too little does."""

    def __init__(self, case: Case) -> None:
        self.case = case
        names: dict[str, Any] = {}
        for source in HELPERS.values():
            exec(source, {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}, names)
        torch.manual_seed(0)
        given = {"x": torch.randn(case.batch, case.channels, *case.size)}
        shapes = {"B": case.batch, "C": case.channels, "SIZE": case.size}
        second, read = SECOND[case.second]
        if second:
            given["z"] = eval(second, {"torch": torch}, shapes)
        self.writer = Writer(case.dims, given, {**names, **shapes})
        self.fitting: list[int] = []
        self.more = ""
        if case.mutates:
            self.writer.line("x.sub_(0.45).div_(0.225)")
        if read:
            self.writer.line(read)
        self._pieces()
        self._output()
        self.text = self._text(second)

    def _pieces(self) -> None:
        writer = self.writer
        for number, piece in enumerate(self.case.pieces):
            before = len(writer.init)
            if write_if_fits(writer, piece):
                self.fitting.append(number)
                if number < self.case.frozen and len(writer.init) > before:
                    for line in writer.init[before:]:
                        name = line.split(" = ")[0]
                        if " = nn." in line and not line.split(" = ")[1].startswith("nn.Parameter"):
                            writer.init.append(f"{name}.requires_grad_(False)")
        if not self.fitting:
            raise Misfit

    def _output(self) -> None:
        """The lines that make the result, of which the first that requires a gradient is `y`."""
        writer, kind = self.writer, self.case.output
        conv = f"nn.Conv{self.case.dims}d"
        self.first, made = "result", "x"
        if kind == "linear":
            writer.line(f"x = F.adaptive_avg_pool{self.case.dims}d(x, 1).flatten(1)")
            writer.layer("head", f"nn.Linear({writer.channels}, 5)")
        elif kind == "view":
            writer.line("x = x.reshape(x.size(0), -1)")
            writer.layer("head", f"nn.Linear({writer.channels}, 3)")
        elif kind != "plain":
            head = writer.attribute("head", f"{conv}({writer.channels}, 4, 1)")
            if kind == "conv":
                writer.line(f"x = {head}(x)")
            if kind == "dict":
                other = writer.attribute("other", f"{conv}({writer.channels}, 2, 3, padding=1)")
                made, self.first = f'{{"a": {head}(x), "b": {other}(x)}}', 'result["a"]'
                self.more = ' + result["b"].float().square().mean()'
            if kind in ("tuple", "detached"):
                mean = str(tuple(range(2, 2 + self.case.dims)))
                made, self.first = f"({head}(x), x.mean({mean}).detach())", "result[0]"
            if kind == "detached":
                made = made[:-1] + ", x.detach())"
            if kind == "argmax":
                writer.line(f"x = {head}(x)")
                made, self.first = "(x, x.argmax(1))", "result[0]"
        self.returned = f"return {made}"

    def _text(self, second: str) -> str:
        case, writer = self.case, self.writer
        dtype = DTYPES.get(case.precision, "")
        cast = f".to({dtype})" if dtype else ""
        layout = {2: "torch.channels_last", 3: "torch.channels_last_3d"}.get(case.dims)
        laid = f".to(memory_format={layout})" if case.channels_last else ""
        images = f"torch.randn(B, C, *SIZE){cast}{laid}" + (".requires_grad_()" if case.input_grad else "")
        body = "\n".join(writer.init + writer.lines)
        init = [
            *writer.init,
            *([f"self.to({dtype})"] if dtype else []),
            *([f"self.to(memory_format={layout})"] if laid else []),
        ]
        methods = ["\n".join(method) + "\n" for method in writer.methods]
        return HEAD.format(
            batch=case.batch, channels=case.channels, size=case.size, options=pprint.pformat(case.options, width=110),
            helpers="".join(source + "\n" for name, source in HELPERS.items() if name in body),
            init=textwrap.indent("\n".join(init) or "pass", " " * 8),
            methods=textwrap.indent("\n".join(methods) + ("\n" if methods else ""), " " * 4),
            arguments="x, z" if second else "x",
            forward=textwrap.indent("\n".join([*writer.lines, self.returned]), " " * 8),
            inputs=images + (f", {second}{cast}" if second else ""),
            first=f"{self.first}.float()" if case.precision in ("bfloat16", "autocast") else self.first,
            loss=LOSSES[case.loss], more=self.more,
        )  # fmt: skip

    def namespace(self) -> dict[str, Any]:
        """What the text defines."""
        names: dict[str, Any] = {"__name__": "case"}
        exec(compile(self.text, "<case>", "exec"), names)
        return names

    def standalone(self) -> str:
        """The text with a main part that compares it with plain autograd."""
        return self.text + MAIN.format(autocast=self.case.precision == "autocast", steps=self.case.steps)
