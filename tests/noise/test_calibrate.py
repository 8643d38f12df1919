"""`calibrate` on small networks: what it finds, what it leaves as it was, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import xconv_fx
from xconv_fx.codec_spec import CodecSpec
from xconv_fx.errors import UnsupportedModelError
from xconv_fx.ops import SavedAs, codec_of, fixed


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 2, 6, 6), torch.randint(0, 3, (size,))


LOSS = nn.functional.cross_entropy


def test_everything_is_left_as_it_was(tmp_path):
    model = build()
    model[4].eval()
    for parameter in model[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in model.parameters()]
    buffers = dict(model.named_buffers())
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    data = [batch(), batch()]
    torch.set_rng_state(generator)
    found = xconv_fx.calibrate(model, LOSS, data, tmp_path / "stats.json")
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert [parameter.grad for parameter in model.parameters()] == grads and float(grads[0].min()) == 1
    assert model.training and not model[4].training and not model[0]._forward_hooks
    assert xconv_fx.Statistics.from_json((tmp_path / "stats.json").read_text()) == found
    assert found.batches == 2 and list(found.layers) == ["0", "1", "4", "7"]


def test_gradients_are_those_of_plain_autograd():
    model, data = build()[4:], [(torch.randn(8, 6, 6, 6), torch.randint(0, 3, (8,))) for _ in range(2)]
    found = xconv_fx.calibrate(model.eval(), LOSS, data)
    assert not model.training
    exact = [torch.autograd.grad(LOSS(model(x), y), model[0].weight)[0] for x, y in data]
    assert found.layers["4"].gradient == pytest.approx(float(torch.stack(exact).mean(0).square().sum()), rel=1e-4)
    own = []
    for x, y in data:
        rows = [torch.autograd.grad(LOSS(model(x[[n]]), y[[n]]) / 8, model[0].weight)[0] for n in range(8)]
        own.append(8 / 7 * float((torch.stack(rows) - torch.stack(rows).mean(0)).square().sum()))
    assert found.layers["4"].sgd == pytest.approx(sum(own) / 2, rel=1e-4)


@pytest.mark.parametrize("bits", [1, 4])
def test_errors_of_a_normalised_input_reach_the_layer_before(bits):
    """Against PyTorch's own backward of batch normalisation, run on codes. Errors of one bit are larger than the input;
    over so few positions their products count."""
    torch.manual_seed(3)
    conv, norm = nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(12 * 25, 3))
    x, y = torch.randn(8, 2, 5, 5), torch.randint(0, 3, (8,))
    found = []
    for seed in range(4):  # Whoever calibrates finds the generator as it was.
        torch.manual_seed(seed)
        found.append(xconv_fx.calibrate(model, LOSS, [(x, y)]).layers["1"])
    assert all([name for name, _ in layer.reaches] == ["0"] for layer in found)
    middle = conv(x).detach().requires_grad_()
    out = norm(middle)
    dy = torch.autograd.grad(LOSS(model[2:](out), y), out)[0]
    held = SavedAs(CodecSpec("quantize", bits=bits), tuple(middle.shape), middle.dtype, (0, 2, 3, 1))
    mean, rstd = middle.detach().mean((0, 2, 3)), (middle.detach().var((0, 2, 3), correction=0) + norm.eps).rsqrt()

    def gradient(value: Tensor) -> Tensor:
        backward = torch.ops.aten.native_batch_norm_backward.default
        dx = backward(dy, value, norm.weight, None, None, mean, rstd, True, norm.eps, [True, False, False])[0]
        return torch.autograd.grad(conv(x), conv.weight, dx)[0]

    exact, value, losses = gradient(middle.detach()), middle.detach(), []
    for seed in torch.randint(2**62, (64, 1)):
        estimate = codec_of("quantize").decode(codec_of("quantize").encode(value, seed, held), seed, held)
        losses.append(float((gradient(estimate) - exact).square().sum()))
    noises = [dict(layer.layout((0, 2, 3, 1)).codes)[bits] for layer in found]
    predicted = [v * dict(layer.reached(v))["0"] for v, layer in zip(noises, found, strict=True)]
    linear = [v * dict(layer.reaches)["0"] for v, layer in zip(noises, found, strict=True)]
    assert sum(predicted) / 4 == pytest.approx(sum(losses) / 64, rel=0.2)
    assert bits > 1 or sum(predicted) > 1.4 * sum(linear)


def test_the_noise_of_an_input_that_is_replayed_from_codes():
    """Against the gradients of draws: codes through PyTorch's batch normalisation and rectifier."""
    torch.manual_seed(4)
    norm, conv = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)
    nn.init.uniform_(norm.bias, -1, 1)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.ReLU(), conv), torch.randn(8, 3, 12, 12)
    known = xconv_fx.calibrate(model, lambda out: (out - 1).square().mean(), [(x, ())]).layers["3"]
    middle = model[0](x).detach()
    mean, variance = middle.mean((0, 2, 3)), middle.var((0, 2, 3), correction=0)
    out = conv(norm(middle).relu())
    dy = 2 * (out.detach() - 1) / out.numel()

    def gradient(value: Tensor) -> Tensor:
        normal = nn.functional.batch_norm(value, mean, variance, norm.weight, norm.bias, eps=norm.eps)
        inner = torch.where(norm(middle) > 0, normal, 0).detach()
        return torch.autograd.grad(conv(inner), conv.weight, dy)[0]

    exact = gradient(middle)
    for bits, predicted in dict(known.replays)["1"]:
        held = SavedAs(CodecSpec("quantize", bits=bits), tuple(middle.shape), middle.dtype, (0, 2, 3, 1))
        losses = []
        for seed in torch.randint(2**62, (24, 1)):
            estimate = codec_of("quantize").decode(codec_of("quantize").encode(middle, seed, held), seed, held)
            losses.append(float((gradient(estimate) - exact).square().sum()) / known.energy)
        assert predicted == pytest.approx(sum(losses) / 24, rel=0.2)


def trained(*layers: nn.Module) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """A network that tells three noisy patterns apart, and a batch that it has not seen."""
    patterns = nn.functional.interpolate(torch.randn(3, 1, 4, 4), scale_factor=4, mode="bilinear")

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 3, (16,))
        return patterns[y] + 1.5 * torch.randn(16, 1, 16, 16), y

    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        x, y = batch()
        optimiser.zero_grad()
        LOSS(model(x), y).backward()
        optimiser.step()
    return model, batch()


def in_fixed_point(norm: nn.Module, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The input of a normalisation layer after a round trip, and the rectified result that is made from it."""
    groups, dims = (
        (x, (0, 2, 3)) if isinstance(norm, nn.BatchNorm2d) else (x.unflatten(1, (norm.num_groups, -1)), (2, 3, 4))
    )
    variance, mean = (
        value.expand_as(groups).reshape(x.shape) for value in torch.var_mean(groups, dims, correction=0, keepdim=True)
    )
    deviation, z = (variance + norm.eps).sqrt(), norm(x)
    shift, slope = (value.view(1, -1, 1, 1).expand_as(x) for value in (norm.bias, norm.weight))
    table = fixed.scales(*(value[:, :, 0, 0] for value in (mean, deviation, shift, slope)), bits)
    held = SavedAs(CodecSpec("fixed", bits=bits), tuple(x.shape), x.dtype, (0, 1, 2, 3))
    decoded = codec_of("fixed").decode(fixed.encode(x, table, held, z > 0), table, held)
    return decoded, torch.where(z > 0, slope * (decoded - mean) / deviation + shift, 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_fixed_point_is_as_far_off_as_measured(bits):
    """What PyTorch's own backward is off by when what it has saved is swapped for what the codec leaves of it. With 2
    bits the errors of both layers have much in common: the first gradient is off by more than their energies say."""
    torch.manual_seed(5)
    first = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    second = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16), nn.ReLU()
    model, (x, y) = trained(*first, *second, nn.Conv2d(16, 16, 3, bias=False), nn.ReLU())
    known = xconv_fx.calibrate(model, LOSS, [(x, y)]).layers
    convolutions, swaps = ("0", "3", "6"), []
    with torch.no_grad():
        for place in (1, 4):
            given = model[:place](x)
            swaps += zip((given, model[: place + 2](x)), in_fixed_point(model[place], given, bits), strict=True)

    def swapped(saved: Tensor) -> Tensor:
        return next((new for old, new in swaps if old.shape == saved.shape and torch.allclose(old, saved)), saved)

    weights = [model[int(name)].weight for name in convolutions]
    exact = torch.autograd.grad(LOSS(model(x), y), weights)
    with torch.autograd.graph.saved_tensors_hooks(swapped, lambda saved: saved):
        loss = LOSS(model(x), y)
    off = [float((g - e).square().sum()) for g, e in zip(torch.autograd.grad(loss, weights), exact, strict=True)]

    fixed_of = {name: {other: dict(pairs)[bits] for other, pairs in known[name].fixed} for name in ("1", "3", "4", "6")}
    before = fixed_of["1"]["0"] + fixed_of["4"]["0"]
    middle = known["3"].energy * fixed_of["3"]["1"] + fixed_of["4"]["3"]
    assert [before, middle, known["6"].energy * fixed_of["6"]["4"]] == pytest.approx(off, rel=0.3)


def test_statistics_of_a_layer_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).relu())

    model, x = Twice(), torch.randn(4, 3, 8)
    found = xconv_fx.calibrate(model, lambda out: out.square().mean(), [(x, ())]).layers["conv"]
    exact = torch.autograd.grad(model(x).square().mean(), model.conv.weight)[0]
    assert found.gradient == pytest.approx(float(exact.square().sum()), rel=1e-4)
    assert found.sgd > 0


class Windows(nn.Module):
    """The layer's rows are windows of samples, not samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, 1, 5)).mean((1, 2))


def test_rows_that_are_no_samples_need_several_batches():
    data = [(torch.randn(2, 10), ()) for _ in range(3)]
    with pytest.raises(UnsupportedModelError, match=r"conv: one batch does not tell.*two batches or more"):
        xconv_fx.calibrate(Windows(), lambda out: out.square().mean(), data[:1])
    model = Windows()
    found = xconv_fx.calibrate(model, lambda out: out.square().mean(), data).layers["conv"]
    exact = torch.stack([torch.autograd.grad(model(x).square().mean(), model.conv.weight)[0] for x, _ in data])
    assert found.sgd == pytest.approx(float(exact.var(0).sum()), rel=1e-3)


MISTAKES = [
    (lambda: (build(), LOSS, []), "batches: there is none to measure"),
    (lambda: (build(), LOSS, [torch.randn(8, 2, 6, 6)]), "one is a tensor of shape .8, 2, 6, 6., not a pair"),
    (lambda: (build(), lambda out, _: out, [batch()]), "the loss: returned a tensor of shape .8, 3."),
    (lambda: (nn.Flatten(), lambda out, _: out.mean(), [batch()]), "Flatten: no such layer of it has a gradient"),
    (lambda: (build().requires_grad_(False), LOSS, [batch()]), "Sequential: no such layer of it has a gradient"),
]


@pytest.mark.parametrize(("given", "told"), MISTAKES, ids=[told[:20] for _, told in MISTAKES])
def test_mistakes_are_told_what_works(given, told):
    with pytest.raises(UnsupportedModelError, match=f"(?s){told}.*What would work: "):
        xconv_fx.calibrate(*given())
