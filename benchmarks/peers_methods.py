"""The memory-saving methods that `peers.py` compares.

`METHODS` is the whole list. The peers of xconv are what a user of torch can switch on today: Inductor as it is, its
partitioner's `activation_memory_budget`, `torch.utils.checkpoint` around the blocks of the network, and Inductor's fp8
quantisation of saved activations. None of them takes a budget in bytes, so they are run at a range of their own knobs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BUDGETS = (0.8, 0.6, 0.4, 0.2, 0.0)
SHARES = (90, 80, 70, 65, 60, 50, 40, 30, 20)
# Residuals below this many MiB stay as they are; torch's default of 100 would leave networks of this size alone.
FP8_SMALLEST = 0.1


@dataclass(frozen=True)
class Method:
    """One way to train. `share` is xconv's budget in per cent of Inductor's peak, None: the lowest that is feasible.

    `exact` methods compute the gradient that autograd computes, up to rounding.
    """

    name: str
    family: str
    exact: bool = True
    compiled: bool = True
    blocks: bool = False
    torch_budget: float = 1.0
    share: int | None = None
    codecs: str = "all"


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("inductor", "inductor"),
        Method("eager", "eager", compiled=False),
        *(Method(f"budget{value:.1f}", "torch budget", torch_budget=value) for value in BUDGETS),
        Method("checkpoint", "checkpoint", compiled=False, blocks=True),
        Method("checkpoint+inductor", "checkpoint", blocks=True),
        Method("fp8", "fp8", exact=False),
        *(Method(f"xconv{share}", "xconv", exact=False, share=share) for share in SHARES),
        Method("xconv-lowest", "xconv", exact=False),
        Method("xconv-exact", "xconv", codecs="exact"),
    )
}
# Run last, at the peak of the exact peer that turned out lowest.
AT_PEER = Method("xconv@peer", "xconv", exact=False)


class Checkpointed(nn.Module):
    """A block of which only the inputs are kept for the backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self.block, *inputs, use_reentrant=False))


def checkpoint_blocks(model: nn.Module, pattern: str) -> None:
    """Wrap the modules whose full names match; parameters keep their order, not their names."""
    for name in [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]:
        path, _, last = name.rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, last, Checkpointed(parent.get_submodule(last)))


def configure(method: Method) -> None:
    """Switch on what is not an argument of `torch.compile`. The process trains by this method only."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    functorch.activation_memory_budget = method.torch_budget
    if method.family == "fp8":
        inductor.post_grad_fusion_options["activation_quantization_aten_pass"] = {
            "quant_type": "torch.float8_e5m2",
            "allowed_dtypes": "torch.float32",
            "size_in_mb": FP8_SMALLEST,
            # Forward and backward have different defaults.
            "use_scaling": True,
            "exclude_primals": True,
        }
