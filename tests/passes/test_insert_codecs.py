"""What rewriting changes in pairs (`EXPECTTEST_ACCEPT=1 pytest` renews the texts) and what they compute.

Both halves run in eager mode. Lossless choices must not change a bit; for stochastic ones the mean error of `DRAWS`
steps, projected on fixed random directions, is compared with its standard error. Of a hundred such z one exceeds
`LARGEST_Z` by chance once in a thousand times, and draws are seeded.
"""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase
from helpers.storage import way
from helpers.torch_versions import needs_text_of_2_13
from helpers.tracing import changes, run_pair, text, trace
from torch import nn

from xconv_fx.errors import BudgetInfeasibleError

DRAWS, LARGEST_Z = 64, 4.5


def conv(before, after):
    return nn.Conv2d(before, after, 3, padding=1)


def last(before):
    """A last layer whose result is small: a loss may keep as much again until the end."""
    return nn.Conv2d(before, 8, 3, stride=4, padding=1)


def tiny():
    """The peak is in the loss, whose results are large, and not where processors take more or less scratch."""
    torch.manual_seed(0)
    return trace(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 32)), torch.randn(2, 3, 16, 16))


def curved():
    """The first convolution, pointwise, is quicker to run again than its activation."""
    torch.manual_seed(0)
    return trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), conv(8, 1)), torch.randn(2, 3, 32, 32))


def smallest(traced, **options):
    """The job of the smallest feasible budget."""
    with pytest.raises(BudgetInfeasibleError) as raised:
        traced.job(mem_budget=1, **options)
    return traced.job(mem_budget=raised.value.smallest, **options)


def in_codes(traced, **options):
    """The job in which all that can be is held in codes, or recomputed from some, and else as it is."""
    job = traced.planning(mem_budget="1GB", **options)
    rows = [[way(candidate).rstrip("0123456789") for candidate in row] for row in job.planning.candidates]
    wanted = ("recomputed_from_codes", "quantize", "keep")
    return job.chosen(tuple(row.index(next(kind for kind in wanted if kind in row)) for row in rows))


class TestText(TestCase):
    def test_quantize_and_bitmask(self):
        traced = tiny()
        before, pair = traced.pair(), smallest(traced, codecs=["quantize:4", "bitmask"]).pair
        self.assertExpectedInline(
            changes(before.forward.graph, pair.forward.graph),
            """\
...
 input primals_5
+seeds = xconv.seeds()
 clone = aten.clone(primals_3)
...
 relu = aten.relu(convolution)
+stored = xconv.stored(relu)
+quantize = xconv.quantize(stored, seeds)
+getitem = quantize[0]
+getitem_1 = quantize[1]
+le_scalar = aten.le(relu)
+pack_mask = xconv.pack_mask(le_scalar)
 convolution_1 = aten.convolution(relu, primals_4, primals_5)
...
 clone_1 = aten.clone(convolution_1)
-return clone_1, primals_3_matrix, primals_1, primals_4, relu
+return clone_1, getitem_1, getitem, seeds, pack_mask, primals_3_matrix, primals_1, primals_4
""",
        )
        self.assertExpectedInline(
            changes(before.backward.graph, pair.backward.graph),
            """\
...
+input relu_quantize_1
+input relu_quantize
+input xconv_seeds
+input le_scalar_bitmask
 input primals_3_matrix
...
 input primals_4
-input relu
 input tangents_1
...
 clone = aten.clone(tangents_1)
-convolution_backward_default = aten.convolution_backward(clone, relu, primals_4)
+dequantize = xconv.dequantize(relu_quantize, relu_quantize_1)
+convolution_backward_default = aten.convolution_backward(clone, dequantize, primals_4)
 getitem_6 = convolution_backward_default[1]
...
 convolution_2 = aten.convolution(clone, primals_4)
-le = aten.le(relu)
 full_default = aten.full()
-where = aten.where(le, full_default, convolution_2)
+unpack_mask = xconv.unpack_mask(le_scalar_bitmask)
+where = aten.where(unpack_mask, full_default, convolution_2)
 clone_1 = aten.clone(view)
""",
        )

    def test_probe(self):
        traced = tiny()
        before, pair = traced.pair(), traced.job(mem_budget="1GB", probes=16).pair
        self.assertExpectedInline(
            changes(before.forward.graph, pair.forward.graph),
            """\
...
 input primals_5
+seeds = xconv.seeds()
 clone = aten.clone(primals_3)
...
 relu = aten.relu(convolution)
+stored = xconv.stored(relu)
+mean = aten.mean(stored)
+sub = aten.sub(stored, mean)
+fold = xconv.fold(sub, seeds)
+le_scalar = aten.le(relu)
+pack_mask = xconv.pack_mask(le_scalar)
 convolution_1 = aten.convolution(relu, primals_4, primals_5)
...
 clone_1 = aten.clone(convolution_1)
-return clone_1, primals_3_matrix, primals_1, primals_4, relu
+return clone_1, mean, fold, seeds, pack_mask, primals_3_matrix, primals_1, primals_4
""",
        )
        self.assertExpectedInline(
            changes(before.backward.graph, pair.backward.graph),
            """\
...
+input relu_probe_1
+input relu_probe
+input xconv_seeds
+input le_scalar_bitmask
 input primals_3_matrix
...
 input primals_4
-input relu
 input tangents_1
...
 clone = aten.clone(tangents_1)
-convolution_backward_default = aten.convolution_backward(clone, relu, primals_4)
+unfold = xconv.unfold(relu_probe, xconv_seeds)
+add = aten.add(unfold, relu_probe_1)
+convert_element_type = prims.convert_element_type(add)
+convolution_backward_default = aten.convolution_backward(clone, convert_element_type, primals_4)
 getitem_6 = convolution_backward_default[1]
...
 convolution_2 = aten.convolution(clone, primals_4)
-le = aten.le(relu)
 full_default = aten.full()
-where = aten.where(le, full_default, convolution_2)
+unpack_mask = xconv.unpack_mask(le_scalar_bitmask)
+where = aten.where(unpack_mask, full_default, convolution_2)
 clone_1 = aten.clone(view)
""",
        )

    @needs_text_of_2_13
    def test_rerun(self):
        traced = curved()
        before, pair = traced.pair(), smallest(traced, codecs="exact").pair
        self.assertExpectedInline(
            changes(before.forward.graph, pair.forward.graph),
            """\
...
 primals_3_matrix = aten.view(primals_3)
-return convolution_1, primals_3_matrix, primals_1, primals_4, convolution, div
+return convolution_1, primals_2, primals_3_matrix, primals_1, primals_4, div
""",
        )
        self.assertExpectedInline(
            changes(before.backward.graph, pair.backward.graph),
            """\
...
+input primals_2
 input primals_3_matrix
...
 input primals_4
-input convolution
 input div
...
 convolution_2 = aten.convolution(tangents_1, primals_4)
-sigmoid = aten.sigmoid(convolution)
+clone_1 = aten.clone(view)
+convolution_3 = aten.convolution(clone_1, primals_1, primals_2)
+sigmoid = aten.sigmoid(convolution_3)
 mul = aten.mul(convolution_2, sigmoid)
 sub = aten.sub(sigmoid)
-mul_1 = aten.mul(convolution, sub)
+mul_1 = aten.mul(convolution_3, sub)
 add_1 = aten.add(mul_1)
""",
        )


class Skip(nn.Module):
    """Joins an upsampled value and an earlier one, as a decoder does."""

    def __init__(self):
        super().__init__()
        self.first, self.down, self.last = conv(3, 8), nn.Conv2d(8, 8, 3, 2, 1), conv(16, 8)

    def forward(self, x):
        high = torch.relu(self.first(x))
        low = nn.functional.interpolate(torch.relu(self.down(high)), scale_factor=2)
        return self.last(torch.cat((high, low), 1).relu())


LOSSLESS = {
    "relu": lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8)),
    "batch norm": lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8)),
    "instance norm": lambda: nn.Sequential(
        conv(3, 8),
        nn.InstanceNorm2d(8, affine=True),
        nn.LeakyReLU(),
        conv(8, 8),
        nn.LeakyReLU(),
        conv(8, 8),
        nn.LeakyReLU(),
        last(8),
    ),
    "pooling": lambda: nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8)
    ),
    "dropout": lambda: nn.Sequential(conv(3, 8), nn.Dropout(), nn.ReLU6(), conv(8, 8)),
    "gelu": lambda: nn.Sequential(conv(3, 8), nn.GELU(), conv(8, 8), nn.GELU(), last(8)),
    "skip": Skip,
    "linear": lambda: nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)),
}


@pytest.mark.parametrize("net", LOSSLESS)
def test_lossless_choices_change_no_bit(net):
    traced = trace(LOSSLESS[net](), torch.randn(2, 3, 16, 16))
    job = smallest(traced, codecs="exact")
    held = {choice.codec for choice in job.plan.choices}
    torch.manual_seed(1)
    plain = run_pair(traced.pair(), traced.primals, traced.tangents())
    torch.manual_seed(1)
    rewritten = run_pair(job.pair, traced.primals, traced.tangents())
    for before, after in zip(plain, rewritten, strict=True):
        for one, other in zip(before, after, strict=True):
            assert one is other is None or torch.equal(one, other)
    if net != "linear":
        assert held - {"keep"}, "nothing was rewritten"


def test_keeping_everything_leaves_the_pair_as_it_was():
    traced = curved()
    pair, job = traced.pair(), traced.job(mem_budget="1GB")
    assert text(job.pair.forward.graph) == text(pair.forward.graph)
    assert text(job.pair.backward.graph) == text(pair.backward.graph)


STOCHASTIC = {
    "1 bit": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), *(2 * [conv(8, 8), nn.ReLU()]), last(8)),
        {"codecs": ["quantize:1", "bitmask"], "max_noise": None, "max_layer_noise": None},
    ),
    "2 bits and replay": (LOSSLESS["batch norm"], {"codecs": ["quantize:2", "bitmask", "recompute"]}),
    "replay through a join": (
        lambda: nn.Sequential(Skip(), conv(8, 16), conv(16, 16), last(16)),
        {"codecs": ["quantize:2", "bitmask", "recompute"]},
    ),
    "4 bits, instance norm": (LOSSLESS["instance norm"], {"codecs": ["quantize:4", "bitmask"]}),
    "fold": (LOSSLESS["batch norm"], {"codecs": ["probe:fold", "bitmask"], "probes": 64}),
    "gaussian": (LOSSLESS["relu"], {"codecs": ["probe:gaussian", "bitmask"], "probes": 64}),
    "linear": (LOSSLESS["linear"], {"codecs": ["probe:fold", "bitmask"], "probes": 16}),
}


@pytest.fixture
def one_thread():
    """Many small operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", STOCHASTIC)
def test_stochastic_choices_are_right_in_the_mean(case, one_thread):
    make, options = STOCHASTIC[case]
    traced = trace(make(), torch.randn(2, 3, 12, 16))
    if "probes" in options:
        job = traced.job(mem_budget="1GB", **options)
    else:
        job = in_codes(traced, **options) if "recompute" in options["codecs"] else smallest(traced, **options)
    assert {choice.codec for choice in job.plan.choices} & {"quantize", "probe"}
    results, exact = run_pair(traced.pair(), traced.primals, traced.tangents())
    draws = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        same, gradients = run_pair(job.pair, traced.primals, traced.tangents())
        assert all(torch.equal(one, other) for one, other in zip(same, results, strict=True)), "the forward is exact"
        draws.append(gradients)
    scale = max(float(gradient.norm()) for gradient in exact if gradient is not None)
    noisy = 0
    for number, gradient in enumerate(exact):
        if gradient is None:
            continue
        errors = torch.stack([(draw[number] - gradient).flatten().double() for draw in draws])
        directions = torch.randn(errors.shape[1], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        along = errors @ (directions / directions.norm(dim=0))
        noisy += bool(along.std() > 1e-4 * scale)
        standard_error = (along.var(0) / DRAWS + (1e-6 * scale) ** 2).sqrt()
        assert (along.mean(0) / standard_error).abs().max() < LARGEST_Z, f"gradient {number}"
    assert noisy


def test_a_mask_before_a_change_of_shape_keeps_its_own_dims():
    """The flattened activation is replayed from codes, with the signs of the true one, which has four dims."""
    stages = [layer for channels in (3, 8) for layer in (conv(channels, 8), nn.BatchNorm2d(8), nn.ReLU())]
    encoder = *stages, nn.Flatten(), nn.Linear(8 * 12 * 16, 12)
    # Large enough that the peak is here, while the encoder's residuals are held.
    decoder = nn.Unflatten(1, (1, 3, 4)), nn.Upsample(scale_factor=12), conv(1, 8), nn.ReLU(), conv(8, 1)
    traced = trace(nn.Sequential(*encoder, *decoder), torch.randn(2, 3, 12, 16))
    job = in_codes(traced, codecs=["quantize:2", "bitmask", "recompute"])
    assert [choice.codec for choice in job.plan.choices if choice.shape == (2, 8 * 12 * 16)] == ["recompute"]
    unpacked = job.pair.backward.graph.find_nodes(op="call_function", target=torch.ops.xconv.unpack_mask.default)
    assert (2, 8, 12, 16) in [tuple(node.meta["val"].shape) for node in unpacked]


def test_a_stream_repeats_its_draws():
    from xconv_fx.ops import seed

    traced = tiny()
    job = traced.job(mem_budget="1GB", probes=16)
    assert job.done is not None
    job = job.planned(job.done, stream=77)
    steps = []
    for _ in range(2):
        seed.start(77, 5)
        steps.append([run_pair(job.pair, traced.primals, traced.tangents())[1] for _ in range(2)])
    first, second = steps[0]
    assert all(one is None or torch.equal(one, other) for one, other in zip(first, steps[1][0], strict=True))
    assert any(one is not None and not torch.equal(one, other) for one, other in zip(first, second, strict=True))
