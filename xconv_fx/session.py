"""What the graphs of one `torch.compile` call share: one budget, one sequence of seeds, one report.

A model whose trace breaks is compiled as several graphs that run in one step. What an earlier graph holds for its
backward is alive while a later one runs, and the parameters of the others are alive throughout, so both count against
a graph's budget. A graph that is compiled again (another batch size) replaces its former self.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from . import hooks
from .options import Options
from .plan import Plan
from .report import write_json

_streams = itertools.count(1)


@dataclass
class Session:
    """The plans of the graphs compiled so far, by the frame that each was traced from.

    `stream` names the sequence of seeds that a fixed `seed` starts; None draws from torch's generator.
    When planning ahead, `device` is where graphs are moved after they were traced elsewhere (None: nowhere),
    `optimizer_bytes` what an optimiser holds besides, and `facts` are fields that all plans share. Raises `OptionError`
    for statistics of another model.
    """

    options: Options
    module: nn.Module | None = None
    stream: int | None = None
    plans: dict[Hashable, Plan] = field(default_factory=dict)
    parameters: dict[Hashable, int] = field(default_factory=dict)
    inputs: dict[Hashable, int] = field(default_factory=dict)
    device: str | None = None
    optimizer_bytes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.options.stats is not None and self.module is not None:
            self.options.stats.check(self.module)

    @staticmethod
    def of(options: Options) -> Session:
        """The session of the `torch.compile` call that is compiling now, or a new one outside of any."""
        call = hooks.compile_call()
        session = getattr(call, "xconv_session", None)
        if session is None:
            session = Session(options, hooks.compiled_module())
            if options.seed is not None:
                from .ops.seed import start

                session.stream = next(_streams)
                start(session.stream, options.seed)
            if call is not None:
                call.xconv_session = session  # type: ignore[attr-defined]
        return session

    def outside(self, gm: fx.GraphModule) -> int:
        """Bytes alive while this graph runs that are none of its tensors.

        The parameters and buffers of the module's other graphs; what earlier graphs hold for their backward, and their
        inputs; the gradients of later graphs, which their backward has left when this one's runs; and the optimiser's
        state.
        """
        # Graphs are compiled in the order in which they run, and keep their place when compiled again.
        earlier = list(itertools.takewhile(lambda frame: frame != hooks.frame(), self.plans))
        held = self.optimizer_bytes
        held += sum(self.plans[frame].saved_after + self.inputs[frame] for frame in earlier)
        if self.module is None:
            return held
        mine = hooks.parameter_bytes(gm)
        before = sum(self.parameters[frame] for frame in earlier)
        every = sum(p.numel() * p.element_size() for p in self.module.parameters())
        buffers = sum(b.numel() * b.element_size() for b in self.module.buffers())
        later = max(0, every - mine - before)
        others = max(0, every + buffers - hooks.parameter_bytes(gm, buffers=True))
        return held + others + later

    def add(self, plan: Plan, gm: fx.GraphModule) -> None:
        """Record a graph's plan, and write all plans where the user asked for them."""
        frame = hooks.frame()
        self.plans[frame] = plan
        self.parameters[frame] = hooks.parameter_bytes(gm)
        self.inputs[frame] = hooks.input_bytes(gm)
        if self.options.report is not None:
            write_json(self.plans.values(), self.options.report)
