"""A module is run ahead of time, and nobody can tell afterwards."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from xconv_fx import hooks
from xconv_fx.device.fake import fake_module, fake_tensor
from xconv_fx.hooks.fake import fake_mode


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def between(x: Tensor) -> Tensor:
    """What a user's code does between two graphs."""
    print("between the graphs")
    warnings.warn("between the graphs", stacklevel=1)
    return x * random.random() * torch.rand(1)


class Broken(nn.Module):
    """Two graphs, with what a step ahead of time must not do twice between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return self.second(between(self.norm(self.first(x)).relu())) * scale


def looking(graphs: list[Any], ahead: list[Any]) -> Callable[..., Any]:
    """A backend that looks ahead when it is handed the first graph of a step, and keeps what it is handed."""

    def collect(gm: Any, inputs: Any) -> Any:
        ahead.append(gm)
        return gm.forward

    def backend(gm: Any, inputs: Any) -> Any:
        if hooks.compiling_code() is Broken.forward.__code__:
            call = hooks.current_call()
            assert call is not None
            assert hooks.more_follows(call.module)
            mode = fake_mode()
            with mode:
                faked = fake_module(call.module, mode, None)
                hooks.run_ahead(faked, [fake_tensor(value, mode, None) for value in call.args], call.kwargs, collect)
        graphs.append(gm)
        return gm.forward

    return backend


def ran(backend: Callable[..., Any]) -> tuple[Broken, Tensor, dict[str, int]]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    random.seed(0)
    net = Broken()
    with pytest.warns(UserWarning, match="between"):
        result = torch.compile(net, backend=backend)(torch.ones(2, 4), scale=2.0)
    return net, result, dict(counters["stats"])


def test_all_graphs_are_seen_and_nothing_is_disturbed(capsys: pytest.CaptureFixture[str]) -> None:
    graphs: list[Any] = []
    ahead: list[Any] = []
    plain, expected, stats = ran(lambda gm, inputs: gm.forward)
    printed = capsys.readouterr().out
    net, result, found = ran(looking(graphs, ahead))
    assert len(ahead) == len(graphs) > 1
    assert torch.equal(result, expected)
    assert capsys.readouterr().out == printed
    assert net.calls == plain.calls == 1
    assert found == stats
    assert net.norm.num_batches_tracked == 1
    assert torch.equal(net.norm.running_mean, plain.norm.running_mean)  # type: ignore[arg-type]


def test_what_was_compiled_ahead_leaves_room_for_as_many_compilations() -> None:
    """Dynamo gives up on code that it has compiled as often as it may."""
    torch._dynamo.reset()
    ahead: list[Any] = []
    net = Broken()
    compiled = torch.compile(net, backend=looking([], ahead), dynamic=False)
    limited = torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
    with limited, pytest.warns(UserWarning, match="between"):  # type: ignore[no-untyped-call]
        for count, samples in enumerate((2, 3), 1):
            net.calls = 0
            compiled(torch.ones(samples, 4))
            assert len(ahead) == 2 * count
        net.calls = 0
        with pytest.raises(FailOnRecompileLimitHit):
            compiled(torch.ones(4, 4))


def test_functions_have_no_call_of_a_module() -> None:
    found: list[Any] = []
    torch._dynamo.reset()

    def backend(gm: Any, inputs: Any) -> Any:
        found.append(hooks.current_call())
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert found == [None]


def test_hooks_that_are_functions_are_known() -> None:
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)))
    assert not hooks.calls_functions(net), "an object, which is copied with the module"
    net[0].register_forward_hook(lambda *_: None)
    assert hooks.calls_functions(net)


def test_a_module_of_one_graph_is_not_run_ahead() -> None:
    found: list[bool] = []
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def backend(gm: Any, inputs: Any) -> Any:
        found.append(hooks.more_follows(net))
        return gm.forward

    torch.compile(net, backend=backend)(torch.ones(2, 4))
    assert found == [False]
