"""Published systems: what each holds, ActNN's allocation on a trained network, XConv's error by number of probes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.tracing import run_joint, run_pair, trace
from torch import Tensor, fx, nn

import xconv_fx
from xconv_fx.passes.graph import is_primal, is_view, nbytes, output_node
from xconv_fx.planner.microbatches import Batch

LARGEST_Z = 4.5


class Block(nn.Module):
    """A basic block of a residual network."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width, after, 3, stride, 1, bias=False)
            for width, stride in ((before, after // before), (after, 1))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for _ in range(2))
        self.shortcut = nn.Conv2d(before, after, 1, 2, bias=False) if after > before else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.convs[1](F.relu(self.norms[0](self.convs[0](x)))))
        return F.relu(y + self.shortcut(x))


def residual_net() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, Block(8, 8), Block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def batch(size=16):
    """Four noisy patterns and which of them each image is."""
    patterns = F.interpolate(torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)), scale_factor=8)
    labels = torch.randint(4, (size,))
    return patterns[labels] + torch.randn(size, 3, 32, 32), labels


@pytest.fixture(scope="module")
def trained():
    """A residual network after some steps, traced, and the gradient of its loss."""
    model = residual_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        x, labels = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    x, labels = batch()
    logits = model(x).detach().requires_grad_()
    F.cross_entropy(logits, labels).backward()
    return trace(model, x), [logits.grad]


def gradients(job, traced, upstream):
    """The gradients of the primals under one draw of the pair's random numbers."""
    primals = [value.clone() if isinstance(value, Tensor) else value for value in traced.primals]
    return run_pair(job.pair, primals, upstream)[1]


def exact_gradients(job, traced, upstream):
    primals = [value.clone() if isinstance(value, Tensor) else value for value in traced.primals]
    return run_joint(traced.gm, primals, upstream)[job.pair.results :]


def taken(job):
    return [(choice.codec, choice.bits) for choice in job.plan.choices]


def uniform(traced, bits):
    """The job with codes of one width wherever the preset has codes."""
    job = traced.planning(codecs="actnn:L3")
    places = []
    for row in job.planning.candidates:
        wanted = [
            n
            for n, c in enumerate(row)
            if c.choice.codec == "bitmask" or (c.choice.codec, c.choice.bits) == ("quantize", bits)
        ]
        places.append(wanted[0] if wanted else 0)
    return job.chosen(tuple(places))


def relative_variance(job, traced, upstream, draws=16):
    """The variance of convolutions' weight gradients over their energy, summed over the layers."""
    exact = exact_gradients(job, traced, upstream)
    found = [gradients(job, traced, upstream) for _ in range(draws)]
    weights = [n for n, gradient in enumerate(exact) if isinstance(gradient, Tensor) and gradient.dim() == 4]
    return sum(torch.stack([g[n] for g in found]).var(0).sum() / exact[n].square().sum() for n in weights).item()


def test_levels_of_actnn(trained):
    traced, _ = trained
    first, second = (traced.job(codecs=f"actnn:{level}") for level in ("L1", "L2"))
    for job in (first, second):
        assert job.planning is not None and not job.options.plain
        for choice in job.plan.choices:
            read = set(choice.uses)
            expected = "bitmask" if read == {"mask"} else "quantize"
            if job is first and "norm" in read:
                expected = "keep"
            assert choice.codec == expected and choice.bits == (4 if expected == "quantize" else None), choice
    assert {"norm", "weight_grad"} <= {use for choice in first.plan.choices for use in choice.uses}
    assert second.plan.saved_after < first.plan.saved_after


def every_kind(dims: int, features: int) -> nn.Module:
    """All kinds of layers for which ActNN has its own, `features` values a channel where it flattens."""
    conv, norm, deconv = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "BatchNorm", "ConvTranspose"))
    largest, mean = (getattr(nn, f"{kind}Pool{dims}d") for kind in ("Max", "Avg"))
    mode = ("linear", "bilinear", "trilinear")[dims - 1]
    return nn.Sequential(
        conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), largest(2),
        deconv(8, 8, 2, stride=2), norm(8), nn.ReLU(), nn.Dropout(0.3), mean(2),
        conv(8, 8, 3, padding=1), nn.SyncBatchNorm(8), nn.ReLU(), nn.Upsample(scale_factor=2, mode=mode),
        conv(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * features, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


def aliases_primal(node: fx.Node) -> bool:
    """Whether a value is a parameter or an input seen in another shape, which takes no memory of its own."""
    while is_view(node) or node.target is torch.ops.aten.permute.default:
        (node,) = node.all_input_nodes
    return is_primal(node)


@pytest.mark.parametrize("image", [(256,), (32, 32), (8, 8, 8)], ids=lambda image: f"{len(image)}d")
def test_every_kind_of_layer_is_held_in_few_bits(image):
    """At level 2: codes of 4 bits, bits of masks, int8 for each pooled value, and nothing else of any size."""
    torch.manual_seed(0)
    traced = trace(every_kind(len(image), math.prod(image)), torch.randn(8, 3, *image))
    job = traced.job(codecs="actnn:L2")
    assert {(choice.codec, choice.bits) for choice in job.plan.choices} == {("quantize", 4), ("bitmask", None)}
    # Ranges of two 16-bit numbers for each group of 256.
    assert job.plan.saved_after <= job.plan.saved_before / 32 * (4 + 1 + 1) + 1024
    outputs = output_node(job.pair.forward.graph).args[0][job.pair.results :]
    crossing = {node for node in outputs if isinstance(node.meta.get("val"), Tensor) and not aliases_primal(node)}
    pooled = 8 * 8 * math.prod(image) // 2 ** len(image)
    assert sum(map(nbytes, crossing)) <= job.plan.saved_after + pooled + 8192


def test_gradients_of_every_kind_of_layer_are_close():
    torch.manual_seed(0)
    model = every_kind(2, 16 * 16)
    model[7].eval()  # Exact and approximate steps would drop other values.
    traced = trace(model, torch.randn(8, 3, 16, 16))
    job, upstream = traced.job(codecs="actnn:L2"), traced.tangents()
    for one, exact in zip(gradients(job, traced, upstream), exact_gradients(job, traced, upstream), strict=True):
        if isinstance(one, Tensor) and one.dim() > 1:
            assert (one - exact).norm() < 0.3 * exact.norm()
            # The last linear layers' inputs are too small to be coded.
            assert one.dim() == 2 or not torch.equal(one, exact)


def test_two_bits_on_average_are_shared_out(trained):
    traced, upstream = trained
    mixed, even = traced.job(codecs="actnn:L3"), uniform(traced, 2)
    elements = sum(choice.bytes_before for choice in even.plan.choices if choice.codec == "quantize") / 4
    bits = sum((choice.bits or 0) * choice.bytes_before / 4 for choice in mixed.plan.choices)
    assert bits <= 2 * elements
    assert len({choice.bits for choice in mixed.plan.choices}) > 1
    assert any("actnn:L3: 2 bits on average" in note for note in mixed.plan.notes)
    assert mixed.plan.saved_after <= even.plan.saved_after
    torch.manual_seed(0)
    assert relative_variance(mixed, traced, upstream) < 0.85 * relative_variance(even, traced, upstream)


def test_bits_are_shared_out_among_samples(trained):
    """As many bytes as with equal widths, wherever there is something to share: codes of 2 and 4 bits."""
    traced, _ = trained
    shared, even = (traced.job(codecs="actnn:L3", sample_bits=by_sample) for by_sample in (None, False))
    assert taken(shared) == taken(even)
    assert shared.plan.saved_after <= 1.01 * even.plan.saved_after
    for choice in shared.plan.choices:
        assert choice.by_sample == (
            "mixed" if (choice.codec, choice.bits) in (("quantize", 2), ("quantize", 4)) else ""
        )
    assert any("shared out among the samples" in note for note in shared.plan.notes)
    assert not any(choice.by_sample for choice in even.plan.choices)


@pytest.mark.parametrize(("apart", "left"), [(True, 0.1), (False, 0.8)], ids=["apart", "mixed"])
def test_samples_with_larger_gradients_get_more_bits(trained, apart, left):
    """Where a few samples have gradients and that is known, rounding adds less; more so where samples are apart."""
    traced, (logits,) = trained
    batch_of = None
    if apart:
        torch.manual_seed(0)
        traced = trace(in_groups(residual_net()), batch()[0])
        holds = [tuple(value.shape) == (16, 3, 32, 32) for value in traced.joint_inputs[0]]
        batch_of = Batch(16, tuple(holds), 0, 0, 0)
    upstream = [logits * torch.where(torch.arange(len(logits)) % 8 == 0, 1.0, 0.01)[:, None]]
    seen = xconv_fx.SampleGradients(len(logits))
    seen.squares[:] = upstream[0].square().sum(1)
    shared, even = (traced.job(codecs="actnn:L3", batch=batch_of, sample_bits=by) for by in (None, False))
    assert {choice.by_sample for choice in shared.plan.choices} == {"", "apart" if apart else "mixed"}
    torch.manual_seed(0)
    with seen.batch(range(len(logits))):
        known = relative_variance(shared, traced, upstream, draws=12)
    assert known < left * relative_variance(even, traced, upstream, draws=12)


def in_groups(model: nn.Module) -> nn.Module:
    """The network with group in the place of batch normalisation."""
    for name, child in model.named_children():
        setattr(model, name, nn.GroupNorm(2, child.num_features) if isinstance(child, nn.BatchNorm2d) else child)
        in_groups(child)
    return model


def test_a_residual_net_holds_a_twelfth_of_eager():
    model, x = residual_net(), torch.randn(16, 3, 32, 32)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved = {}

    def hold(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        out = model(x)
    eager = sum(size for size, _ in saved.values())
    assert out.requires_grad
    job = trace(model, x).job(codecs="actnn:L3")
    assert eager >= 12 * job.plan.saved_after


class Convolutions(nn.Module):
    """Borders, strides, groups, dilation and even kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, stride=2, padding=1),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
            nn.Conv2d(4, 3, 2),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


@pytest.fixture(scope="module")
def convolutions():
    torch.manual_seed(0)
    return trace(Convolutions().double(), torch.randn(2, 2, 16, 16, dtype=torch.float64))


def relative_error(job, traced, upstream, draws):
    """Root mean square of the errors of the weight gradients that probes estimate, over those gradients."""
    exact = exact_gradients(job, traced, upstream)
    # The first convolution's input is the user's, and exact.
    probed = [n for n, gradient in enumerate(exact) if isinstance(gradient, Tensor) and gradient.dim() == 4][1:]
    errors = [
        sum((found[n] - exact[n]).square().sum() / exact[n].square().sum() for n in probed)
        for found in (gradients(job, traced, upstream) for _ in range(draws))
    ]
    return math.sqrt(sum(errors) / draws)


def test_xconv_probes_convolutions_and_keeps_the_rest(trained):
    traced, _ = trained
    job = traced.job(codecs="xconv")
    assert {choice.codec for choice in job.plan.choices} == {"keep", "probe", "bitmask"}
    for choice in job.plan.choices:
        if choice.codec == "probe":
            assert choice.kind == "gaussian" and choice.probes == 8 and "weight_grad" in choice.uses
        else:
            assert choice.codec == ("bitmask" if choice.uses == ("mask",) else "keep")
    (other,) = {c.kind for c in traced.job(codecs="xconv:independent", probes=3).plan.choices if c.codec == "probe"}
    assert other == "independent"


def test_all_probes_give_the_exact_gradient(convolutions):
    upstream = convolutions.tangents()
    job = convolutions.job(codecs="xconv:orthogonal", probes=4 * 16 * 16)
    assert relative_error(job, convolutions, upstream, draws=1) < 1e-7


def test_the_error_falls_with_the_root_of_the_probes(convolutions):
    upstream = convolutions.tangents()
    torch.manual_seed(0)
    counts = (4, 20, 80, 400)
    errors = [relative_error(convolutions.job(codecs="xconv", probes=r), convolutions, upstream, 24) for r in counts]
    xs, ys = ([math.log(value) for value in values] for values in (counts, errors))
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(xs, ys, strict=True)) / sum((a - mean_x) ** 2 for a in xs)
    assert slope == pytest.approx(-0.5, rel=0.1)


@pytest.mark.parametrize("kind", ["gaussian", "independent"])
def test_every_weight_is_unbiased(convolutions, kind):
    upstream, draws = convolutions.tangents(), 200
    torch.manual_seed(0)
    job = convolutions.job(codecs=f"xconv:{kind}", probes=8)
    exact = exact_gradients(job, convolutions, upstream)
    found = [gradients(job, convolutions, upstream) for _ in range(draws)]
    noisy = 0
    for n, gradient in enumerate(exact):
        if isinstance(gradient, Tensor):
            errors = torch.stack([g[n] for g in found]) - gradient
            noisy += bool(errors.std() > 1e-6 * gradient.norm())
            z = errors.mean(0) / (errors.std(0) / draws**0.5 + 1e-10 * gradient.norm())
            assert z.abs().max() < LARGEST_Z
    assert noisy == 3
