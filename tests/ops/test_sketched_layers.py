"""Layers that hold a sketch of their input: exact where they must be, unbiased elsewhere, and small in between."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import xconv_fx.ops.sketched_layers  # noqa: F401 (registers the ops)

ops = torch.ops.xconv
aten = torch.ops.aten

# name: input size, weight size, (stride, padding, dilation, transposed, output_padding, groups)
LAYERS = {
    "1d": ((3, 2, 9), (4, 2, 3), ([1], [1], [1], False, [0], 1)),
    "stride 2": ((3, 2, 6, 7), (4, 2, 3, 3), ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)),
    "dilation 2, same": ((3, 2, 6, 6), (4, 2, 3, 3), ([1, 1], [2, 2], [2, 2], False, [0, 0], 1)),
    "groups": ((3, 4, 5, 5), (4, 2, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 2)),
    "2x2, padding 0": ((3, 2, 6, 6), (4, 2, 2, 2), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
    "1x1": ((3, 4, 4, 4), (4, 4, 1, 1), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
    "3d": ((3, 2, 4, 4, 3), (4, 2, 3, 3, 3), ([1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1)),
    "transposed": ((3, 4, 4, 4), (4, 3, 2, 2), ([2, 2], [0, 0], [1, 1], True, [1, 1], 1)),
    "linear": ((4, 24), (5, 24), None),
    "linear on tokens": ((3, 5, 8), (6, 8), None),
}
PLAIN = LAYERS["2x2, padding 0"]
RECIPES = {
    "fold": ("fold", 32, False),
    "fold 4 bits": ("fold", 4, False),
    "fold 2 bits, means": ("fold", 2, True),
    "gaussian": ("gaussian", 32, False),
    "rademacher 8 bits": ("rademacher", 8, False),
    "orthogonal, means": ("orthogonal", 32, True),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for the threads of other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apply(x, weight, bias, geometry, probes, kind="fold", bits=32, means=False, seed=None):
    """The op; `probes` 0 holds values in `bits` bits."""
    if geometry is None:
        return ops.linear(x, weight, bias, probes, kind, bits, means, seed)
    return ops.convolution(x, weight, bias, *geometry, probes, kind, bits, means, seed)


def exact(x, weight, bias, geometry):
    return F.linear(x, weight, bias) if geometry is None else aten.convolution(x, weight, bias, *geometry)


def draw(layer, dtype=torch.float64):
    """Input, weight, bias, geometry and an output gradient."""
    size, weight_size, geometry = layer
    generator = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    channels = weight_size[1] * geometry[-1] if geometry and geometry[3] else weight_size[0]
    x, weight, bias = (normal(shape).requires_grad_() for shape in (size, weight_size, (channels,)))
    grad_out = normal(exact(x, weight, bias, geometry).shape)
    return x, weight, bias, geometry, grad_out


def seed(value):
    return torch.tensor([value])


@pytest.mark.parametrize("kind", ["fold", "orthogonal"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_probe_gives_the_exact_gradient(layer, kind):
    x, weight, bias, geometry, grad_out = draw(LAYERS[layer])
    values = math.prod(x.shape[1:])
    out = apply(x, weight, bias, geometry, values, kind)
    reference = exact(x, weight, bias, geometry)
    assert torch.equal(out, reference)
    ours = torch.autograd.grad(out, (x, weight, bias), grad_out)
    theirs = torch.autograd.grad(reference, (x, weight, bias), grad_out)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= (1e-12 if kind == "fold" else 1e-8) * other.norm()


@pytest.mark.parametrize("kind", ["fold", "orthogonal"])
@pytest.mark.parametrize("layer", ["stride 2", "groups", "linear"])
def test_under_bfloat16_every_probe_adds_less_than_rounding(layer, kind):
    """What the sketch adds is below what bfloat16 itself costs at r = D, and far above it at half of that."""
    x, weight, bias, geometry, grad_out = draw(LAYERS[layer], torch.bfloat16)
    wide = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    (true,) = torch.autograd.grad(exact(*wide, geometry), wide[1], grad_out.double())
    (rounded,) = torch.autograd.grad(exact(x, weight, bias, geometry), weight, grad_out)
    rounding = (rounded.double() - true).norm()
    values = math.prod(x.shape[1:])
    added = []
    for probes in (values, values // 2):
        out = apply(x, weight, bias, geometry, probes, kind, seed=seed(3))
        (estimate,) = torch.autograd.grad(out, weight, grad_out)
        added.append((estimate.double() - rounded.double()).norm())
    assert added[0] <= rounding < 0.1 * added[1]


def check_unbiased(layer, recipe, draws=150, probes=None):
    """Mean of `draws` weight gradients against the exact one; input and bias gradients against theirs.

    A true mean exceeds 6 standard errors at one of the few dozen elements in less than one run of a million; the
    mean squared deviation in standard errors is 1 with a spread well below 1.5.
    """
    x, weight, bias, geometry, grad_out = draw(layer)
    probes = math.prod(x.shape[1:]) // 3 if probes is None else probes
    theirs = torch.autograd.grad(exact(x, weight, bias, geometry), (x, weight, bias), grad_out)
    estimates = []
    for value in range(draws):
        out = apply(x, weight, bias, geometry, probes, *recipe, seed(value))
        grad_x, estimate, grad_bias = torch.autograd.grad(out, (x, weight, bias), grad_out)
        estimates.append(estimate)
    torch.testing.assert_close((grad_x, grad_bias), (theirs[0], theirs[2]))
    stack = torch.stack(estimates)
    deviation = (stack.mean(0) - theirs[1]) / (stack.std(0) / math.sqrt(draws))
    assert stack.std(0).min() > 0
    assert deviation.abs().max() < 6
    assert deviation.square().mean() < 2.5


@pytest.mark.parametrize("layer", LAYERS)
def test_unbiased(layer):
    check_unbiased(LAYERS[layer], ("fold", 32, False))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "fold"])
def test_unbiased_with_every_recipe(recipe):
    check_unbiased(PLAIN, RECIPES[recipe])


@pytest.mark.parametrize("layer", ["stride 2", "linear on tokens"])
def test_unbiased_values_in_few_bits(layer):
    check_unbiased(LAYERS[layer], ("fold", 2, None), probes=0)


@pytest.mark.parametrize("layer", ["stride 2", "linear on tokens"])
@pytest.mark.parametrize("bits", [16, 4])
def test_values_in_few_bits(saved_by, layer, bits):
    """Within a step of the exact values; held are their codes in whole words, and two extremes of each group."""
    x, weight, bias, geometry, grad_out = draw(LAYERS[layer], torch.float32)
    held, out = saved_by(lambda: apply(x, weight, bias, geometry, 0, bits=bits))
    step = (x.max() - x.min()) / (2**bits - 1)
    errors = torch.full_like(x, step.item())
    exactly = exact(x, weight, bias, geometry)
    (theirs,) = torch.autograd.grad(exactly, weight, grad_out, retain_graph=True)
    (bound,) = torch.autograd.grad(exact(errors, weight, bias, geometry), weight, grad_out.abs())
    assert ((torch.autograd.grad(out, weight, grad_out)[0] - theirs).abs() <= bound + 1e-4).all()
    codes = sum(tensor.nbytes for tensor in held if tensor.dtype == torch.int32)
    assert x.numel() * bits / 8 <= codes <= 1.5 * x.numel() * bits / 8
    assert x.data_ptr() not in {tensor.data_ptr() for tensor in held}


def test_more_probes_than_values_are_the_values():
    x, weight, bias, geometry, grad_out = draw(PLAIN)
    ours = torch.autograd.grad(apply(x, weight, bias, geometry, 10**6, means=None), weight, grad_out)
    torch.testing.assert_close(ours, torch.autograd.grad(exact(x, weight, bias, geometry), weight, grad_out))


def test_means_are_held_beside_fewer_folds_than_pixels(saved_by):
    """And nowhere else, unless they are asked for."""

    def means_held(probes, kind="fold", layer=PLAIN, means=None):
        x, weight, bias, geometry, _ = draw(layer)
        held, _ = saved_by(lambda: apply(x, weight, bias, geometry, probes, kind, means=means))
        return any(tensor.shape == (*x.shape[:2], 1, 1) for tensor in held)

    assert means_held(8) and means_held(8, "gaussian", means=True)
    assert not (means_held(72) or means_held(8, "gaussian") or means_held(8, means=False))
    assert not means_held(4, layer=LAYERS["linear"], means=True)


def test_unbatched():
    x, weight, bias, geometry, grad_out = draw(LAYERS["transposed"])
    out = apply(x[0], weight, bias, geometry, 10**6)
    assert torch.equal(out, exact(x[0][None], weight, bias, geometry)[0])
    exactly = torch.autograd.grad(exact(x[:1], weight, bias, geometry), weight, grad_out[:1])
    torch.testing.assert_close(torch.autograd.grad(out, weight, grad_out[0]), exactly)


@pytest.mark.parametrize("layer", ["2x2, padding 0", "linear"])
def test_seeds_are_drawn_with_and_without_gradients(layer):
    """A checkpointed segment runs first without: what else is random in it must not change."""
    x, weight, bias, geometry, _ = draw(LAYERS[layer])

    def following(trainable, grad):
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            apply(x, weight.detach().requires_grad_(trainable), bias, geometry, 8)
        return torch.rand(()).item()

    assert following(True, True) == following(True, False)
    assert following(False, True) == following(False, False) != following(True, True)


def test_unbiased_with_fewer_probes_than_samples():
    check_unbiased(((8, 2, 3, 2), (4, 2, 2, 2), PLAIN[2]), ("gaussian", 32, False))


@pytest.mark.parametrize("layer", ["stride 2", "3d", "linear on tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(layer, dtype):
    """One seed draws the same signs in every dtype, so the estimates differ by rounding only."""
    x, weight, bias, geometry, grad_out = draw(LAYERS[layer], dtype)
    out = apply(x, weight, bias, geometry, 8, seed=seed(3))
    grads = torch.autograd.grad(out, (x, weight, bias), grad_out)
    assert {grad.dtype for grad in grads} == {dtype}
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    reference = torch.autograd.grad(apply(*wide, geometry, 8, seed=seed(3)), wide, grad_out.double())
    for mine, other in zip(grads, reference, strict=True):
        assert (mine - other).norm() < 20 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("layer", ["stride 2", "linear on tokens"])
def test_only_payload_seed_and_weight_are_held(saved_by, layer, bits, means):
    x, weight, bias, geometry, _ = draw(LAYERS[layer], torch.float32)
    held, _ = saved_by(lambda: apply(x, weight, bias, geometry, 8, "fold", bits, means))
    samples, channels = x.shape[:2]
    # 8 sums a sample: float32, or 4-bit codes in whole words and one range of two float32 for all of these few.
    sums = samples * 8 * 4 if bits == 32 else samples * 4 + 2 * 4
    rest = [tensor for tensor in held if tensor.data_ptr() != weight.data_ptr()]
    assert sum(tensor.nbytes for tensor in rest) == sums + means * samples * channels * 4 + 8
    assert x.data_ptr() not in {tensor.data_ptr() for tensor in held}


def test_the_input_is_freed():
    _, weight, bias, geometry, _ = draw(PLAIN)
    x = torch.randn(PLAIN[0], dtype=torch.float64)
    gone = weakref.ref(x)
    out = apply(x, weight, bias, geometry, 8)
    del x
    gc.collect()
    assert gone() is None
    out.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("layer", ["stride 2", "linear"])
def test_frozen(saved_by, layer):
    x, weight, bias, geometry, grad_out = draw(LAYERS[layer])
    weight.requires_grad_(False)
    held, out = saved_by(lambda: apply(x, weight, bias, geometry, 8))
    assert [tensor.data_ptr() for tensor in held] == [weight.data_ptr()]
    theirs = torch.autograd.grad(exact(x, weight, bias, geometry), (x, bias), grad_out)
    torch.testing.assert_close(torch.autograd.grad(out, (x, bias), grad_out), theirs)

    weight.requires_grad_(True)
    held, out = saved_by(lambda: apply(x.detach(), weight, bias, geometry, 8))
    assert weight.data_ptr() not in {tensor.data_ptr() for tensor in held}
    assert torch.autograd.grad(out, weight, grad_out)[0].shape == weight.shape
    with torch.no_grad():
        assert not apply(x, weight, bias, geometry, 8).requires_grad


def test_without_bias_and_single_sample_of_a_linear_layer():
    x, weight, _, _, _ = draw(LAYERS["linear"])
    out = apply(x[0], weight, None, None, 24)
    torch.testing.assert_close(out, F.linear(x[0], weight))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), weight)[0], x[0].detach().expand_as(weight))


@pytest.mark.parametrize("layer", ["2x2, padding 0", "linear"])
def test_empty_batch(layer):
    x, weight, bias, geometry, _ = draw(LAYERS[layer])
    apply(x[:0], weight, bias, geometry, 8).sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("kind", ["fold", "gaussian"])
def test_channels_last(kind):
    x, weight, bias, geometry, grad_out = draw(LAYERS["groups"])
    strided = x.detach().to(memory_format=torch.channels_last)
    out = apply(strided, weight, bias, geometry, 100 if kind == "fold" else 8, kind, seed=seed(0))
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = exact(x, weight, bias, geometry)
    if kind == "gaussian":  # dense probes read in logical order: the same estimate
        expected = apply(x, weight, bias, geometry, 8, kind, seed=seed(0))
    torch.testing.assert_close(
        torch.autograd.grad(out, weight, grad_out), torch.autograd.grad(expected, weight, grad_out)
    )


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.randn(4, 2, 3, 3))
        self.weight = torch.nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        x = torch.ops.xconv.convolution(x, self.kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, 9, "fold", 4)
        return torch.ops.xconv.linear(x.relu().mean((2, 3)), self.weight, None, 2, "gaussian")


def parameter_gradients(forward, module, x, generator_seed=7):
    module.zero_grad()
    torch.manual_seed(generator_seed)
    forward(x).float().square().sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net(), torch.randn(4, 2, 5, 5, requires_grad=True)


def test_seeds_come_from_the_default_generator(net):
    module, x = net
    first = parameter_gradients(module, module, x)
    torch.testing.assert_close(parameter_gradients(module, module, x), first, rtol=0, atol=0)
    other = parameter_gradients(module, module, x, generator_seed=8)
    assert not torch.allclose(other[0], first[0])


def test_fx_graphs_checkpoint_and_compile_agree_with_eager(net):
    module, x = net
    expected = parameter_gradients(module, module, x)
    graph = torch.fx.symbolic_trace(module)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert ops.convolution in targets
    assert ops.linear in targets
    duplicate = copy.deepcopy(graph)
    torch.testing.assert_close(parameter_gradients(duplicate, duplicate, x), expected, rtol=0, atol=0)
    for reentrant in (False, True):
        again = parameter_gradients(lambda x, r=reentrant: checkpoint(module, x, use_reentrant=r), module, x)
        torch.testing.assert_close(again, expected, rtol=0, atol=0)
    compiled = torch.compile(graph, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(parameter_gradients(compiled, module, x), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(saved_by, net, dtype):
    module, x = net
    with torch.autocast("cpu", dtype=dtype):
        held, out = saved_by(lambda: module(x))
    assert out.dtype == dtype
    assert dtype in {tensor.dtype for tensor in held}
    assert not any(tensor.shape == x.shape for tensor in held)
    out.float().sum().backward()
    assert {parameter.grad.dtype for parameter in module.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        assert module.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("recipe", RECIPES)
def test_values_that_are_not_finite_surface(recipe, value):
    x, weight, bias, geometry, grad_out = draw(PLAIN, torch.float32)
    x.detach()[1, 1, 2, 3] = value
    out = apply(x, weight, bias, geometry, 9, *RECIPES[recipe])
    assert not torch.autograd.grad(out, weight, grad_out)[0].isfinite().all()


@pytest.mark.parametrize("layer", ["2x2, padding 0", "linear"])
def test_second_derivatives_are_refused(layer):
    x, weight, bias, geometry, _ = draw(LAYERS[layer])
    out = apply(x, weight, bias, geometry, 8)
    grad_x, grad_weight = torch.autograd.grad(out.sum(), (x, weight), create_graph=True)
    for grad in (grad_x, grad_weight):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            grad.sum().backward(retain_graph=True)


def test_errors():
    x, weight, bias, geometry, _ = draw(PLAIN)
    with pytest.raises(ValueError, match=r"'hash'.*fold, gaussian, rademacher, orthogonal"):
        apply(x, weight, bias, geometry, 8, "hash")
    with pytest.raises(ValueError, match=r"bits=3.*8, 4, 2, 1"):
        apply(x, weight, bias, geometry, 8, "fold", 3)
    with pytest.raises(ValueError, match="probes=-1"):
        apply(x, weight, bias, geometry, -1)
    with pytest.raises(ValueError, match=r"bits=32.*8, 4, 2, 1"):
        apply(x, weight, bias, geometry, 0)
    out = ops.sketched_convolution(x, weight, bias, [], None, *geometry, 8, "fold", 32, False)
    with pytest.raises(RuntimeError, match="held no sketch"):
        out.sum().backward()


# torch 2.14 and later make copies of arguments that are no leaves, and look at their gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("layer", ["stride 2", "transposed", "linear on tokens"])
def test_opcheck(layer):
    x, weight, bias, geometry, _ = draw(LAYERS[layer], torch.float32)
    op = ops.linear if geometry is None else ops.convolution
    torch.library.opcheck(op.default, (x, weight, bias, *(geometry or ()), 8, "fold", 4, False, seed(1)))
    payload = [torch.randn(x.shape[0], 8)]
    inner = ops.sketched_linear if geometry is None else ops.sketched_convolution
    torch.library.opcheck(inner.default, (x, weight, bias, payload, seed(1), *(geometry or ()), 8, "fold", 32, False))
