"""What is recomputed of what is recomputed: exact, and no higher than checkpoints, wherever these are put."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.compiled import Compile
from helpers.nets import gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from xconv_fx.codec_spec import BLOCK
from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.measure import training_peak
from xconv_fx.planner import problem


class Dense(nn.Module):
    """Each layer reads the concatenation of all before it; a residual around it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        widths = [channels + place * growth for place in range(4)]
        self.layers = nn.ModuleList(nn.Conv2d(width, growth, 3, padding=1) for width in widths[:-1])
        self.last = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(F.leaky_relu(layer(torch.cat(features, 1)), 0.2))
        return x + 0.2 * self.last(torch.cat(features, 1))


class Joined(nn.Module):
    """A U-Net of one level: what is upsampled is the result of a convolution, and read by the concatenation alone."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())

        self.encoder = nn.Sequential(block(width, width), block(width, width))
        self.bottom = nn.Sequential(block(width, width), nn.Dropout2d(0.2), block(width, width))
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.decoder = nn.Sequential(block(2 * width, width), block(width, width))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encoder(x)
        return self.decoder(torch.cat((skip, self.up(self.bottom(F.max_pool2d(skip, 2)))), 1))


def chain() -> nn.Sequential:
    blocks = (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(12))
    return nn.Sequential(*blocks)


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "dense": lambda: nn.Sequential(Dense(8, 4), Dense(8, 4), Dense(8, 4)),
    "joined": lambda: Joined(8),
    "blocks": lambda: nn.Sequential(*(Dense(8, 8) for _ in range(6))),
}


class InSegments(nn.Module):
    """A sequential network with checkpoints around equal parts, and around each layer in them if they are `nested`."""

    def __init__(self, layers: nn.Sequential, parts: int, nested: bool = False) -> None:
        super().__init__()
        self.layers, self.parts, self.nested = layers, parts, nested

    def forward(self, x: Tensor) -> Tensor:
        if self.nested:
            size = len(self.layers) // self.parts
            for start in range(0, len(self.layers), size):
                part = InSegments(self.layers[start : start + size], size)
                x = checkpoint(part, x, use_reentrant=False)
            return x
        if self.parts == len(self.layers):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x
        return checkpoint_sequential(self.layers, self.parts, x, use_reentrant=False)


def net(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETS[name]()


def images() -> Tensor:
    return torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(1))


def buffers(model: nn.Module) -> list[Tensor]:
    return [buffer.double() for buffer in model.buffers()]


@pytest.mark.parametrize("name", NETS)
def test_gradients_and_statistics_are_those_of_one_forward(compile_tightly: Compile, name: str):
    expected, model = net(name), net(name)
    compiled = compile_tightly(model, images(), codecs=["recompute"])
    before = copy.deepcopy(expected.state_dict())
    gradients(compiled.model, images())  # Compiles.
    model.load_state_dict(before)
    torch.manual_seed(2)
    found = gradients(compiled.model, images())
    torch.manual_seed(2)
    inductor = torch.compile(expected)
    for name, gradient in gradients(inductor, images()).items():
        assert (found[name] - gradient).norm() <= 1e-4 * max(gradient.norm().item(), 1e-3), name
    for one, other in zip(buffers(model), buffers(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    again = [choice for choice in compiled.plan.choices if choice.codec == "recompute"]
    held = sum(choice.bytes_after for choice in compiled.plan.choices)
    assert len(again) > 2 and held < 0.6 * sum(choice.bytes_before for choice in compiled.plan.choices)


@pytest.mark.parametrize(
    ("name", "parts", "nested"), [("chain", (2, 3, 4, 6, 12), ()), ("dense", (3,), ()), ("blocks", (3, 6), (3,))]
)
def test_no_higher_than_checkpoints(
    compile_tightly: Compile, name: str, parts: tuple[int, ...], nested: tuple[int, ...]
):
    layers = net(name)
    assert isinstance(layers, nn.Sequential)
    ways = [(count, False) for count in parts] + [(count, True) for count in nested]
    least = min(training_peak(InSegments(layers, *way), images(), Tensor.mean).bytes for way in ways)
    compiled = compile_tightly(net(name), images(), codecs=["recompute"])
    peak = training_peak(compiled.model, images(), Tensor.mean)
    assert peak.bytes <= compiled.plan.budget
    assert peak.bytes <= least


def test_blocks_are_made_again_from_their_inputs(compile_tightly: Compile, monkeypatch: pytest.MonkeyPatch):
    """What is inside of a block is made again for each sum behind it, and again for itself: fewer sums are held."""
    compiled = compile_tightly(net("blocks"), images(), codecs=["recompute"])
    compiled.model(images())
    assert any(choice.codec == "recompute" and choice.kind == BLOCK for choice in compiled.plan.choices)
    monkeypatch.setattr(problem, "find_block", lambda *_: None)
    options = {"mem_budget": compiled.plan.budget, "codecs": ["recompute"], "slices": 1}
    torch._dynamo.reset()
    with pytest.raises(BudgetInfeasibleError):
        torch.compile(net("blocks"), backend="xconv", options=options)(images())
