"""What is compiled is more than a model: optimisers and other code change the user's tensors, not copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Made = tuple[Callable[[], Any], list[Tensor]]
# Raised by Dynamo, which traces through the profiler's annotation of an optimiser's step.
pytestmark = pytest.mark.filterwarnings("ignore:Profiler record function")


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 1, 3)).double()


def with_gradients() -> list[Tensor]:
    """Parameters whose gradients are sines."""
    parameters = list(net().parameters())
    for parameter in parameters:
        parameter.grad = torch.arange(1, 1 + parameter.numel(), dtype=torch.float64).sin().reshape(parameter.shape)
    return parameters


def optimiser(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[], Made]:
    def made() -> Made:
        parameters = with_gradients()
        return make(parameters).step, parameters

    return made


def clipping() -> Made:
    parameters = with_gradients()
    return lambda: nn.utils.clip_grad_norm_(parameters, 0.5), [p.grad for p in parameters if p.grad is not None]


def closure() -> Made:
    """Tensors that a function has closed over: a counter, and an average."""
    count, weight = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def call() -> Tensor:
        count.add_(1)
        weight.lerp_(count, 0.1)
        return weight.sum()

    return call, [count, weight]


CODE = {
    "SGD": optimiser(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "Adam": optimiser(lambda p: torch.optim.Adam(p, torch.tensor(0.1, dtype=torch.float64))),
    "foreach AdamW": optimiser(lambda p: torch.optim.AdamW(p, 0.1, foreach=True)),
    "clipping": clipping,
    "closure": closure,
}


@pytest.mark.parametrize("code", CODE)
def test_what_is_written_to_is_the_users(code: str) -> None:
    """As by Inductor to the bit; its Adam corrects the bias in float32, eager's in float64."""
    seen = []
    for backend in (None, "inductor", "xconv"):
        torch._dynamo.reset()
        call, tensors = CODE[code]()
        before = [tensor.detach().clone() for tensor in tensors]
        step = call if backend is None else torch.compile(call, backend=backend)
        for _ in range(3):
            step()
        assert not any(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
        seen.append([tensor.detach() for tensor in tensors])
    eager, inductor, ours = seen
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, inductor, strict=True))
    torch.testing.assert_close(ours, eager, rtol=1e-4 if "Adam" in code else 1e-12, atol=1e-12)
