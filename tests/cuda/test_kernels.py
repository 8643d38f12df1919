"""Kernels that are generated for CUDA: compiled for GPUs that are not there, and run by Triton's interpreter."""

from __future__ import annotations

from math import prod

import pytest
from helpers.fake_cuda import FakeCuda
from helpers.fake_cuda.cases import ENCODED, MATRIX, UNITS, forced
from helpers.fake_cuda.records import Case
from helpers.fake_cuda.units import Unit

from xconv_fx.codec_spec import CodecSpec

CAPABILITIES = (80, 90, 100)
# Sums in another order, of float32, and of values that a layer before was given rounded to bfloat16.
TOLERANCES = {None: 5e-6, "bfloat16": 2e-2}
REORDERED = 2e-7
# A value whose ulps differ may be rounded to another code.
CODES_APART = 1e-3
SMALL = forced("2d-small", CodecSpec("quantize", bits=4))


def check_cubins(cuda: FakeCuda, case: Case) -> None:
    generated = cuda.generate(case)
    for half in generated.halves:
        found = cuda.cubins(half.code, CAPABILITIES)
        assert found and all(cubin.local == 0 and cubin.registers <= 128 for cubin in found)


def check_numerics(cuda: FakeCuda, case: Case) -> None:
    interpreted = cuda.interpret(cuda.generate(case))
    assert interpreted.forward and interpreted.backward
    for value in interpreted.compared:
        if value.dtype in ("int32", "int64", "bool"):
            assert value.differing <= CODES_APART * value.elements, value
        else:
            assert value.error <= TOLERANCES[case.amp], value


def test_no_kernel_spills(cuda: FakeCuda) -> None:
    check_cubins(cuda, SMALL)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.name}{unit.bits} {unit.size} {unit.dtype}")
def test_operators_alone_give_the_same_bits(cuda: FakeCuda, unit: Unit) -> None:
    """On sizes that fill no block, and in both layouts; only sums are taken in another order."""
    for value in cuda.unit(unit).compared:
        assert value.error <= REORDERED if unit.name == "fold" else value.differing == 0, value


@pytest.mark.parametrize("unit", ENCODED, ids=lambda unit: f"{unit.bits} {unit.size} {unit.dtype}")
def test_encoding_reads_a_tensor_once(cuda: FakeCuda, unit: Unit) -> None:
    """In one launch, which writes the same codes and ranges as the operator does on a CPU."""
    found = cuda.unit(unit)
    assert all(value.differing == 0 for value in found.compared)
    (launch,) = found.launches
    assert launch.kernel == "quantize_kernel"
    assert launch.read == prod(unit.size) * (4 if unit.dtype == "float32" else 2) + 8


def test_groups_that_fit_no_tile_are_read_twice(cuda: FakeCuda) -> None:
    unit = Unit("encode", (3, 1009), (0, 1), 4)
    found = cuda.unit(unit)
    assert all(value.differing == 0 for value in found.compared)
    assert "quantize_kernel" not in {launch.kernel for launch in found.launches}
    assert sum(launch.read for launch in found.launches) > 2 * 4 * prod(unit.size)


@pytest.mark.parametrize("bits", [8, 1])
def test_the_kernel_of_codes_does_not_spill(cuda: FakeCuda, bits: int) -> None:
    for capability in CAPABILITIES:
        assert cuda.call("units:local_memory", bits, capability) == 0


def test_a_step_computes_what_its_graphs_do(cuda: FakeCuda) -> None:
    check_numerics(cuda, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.label)
def test_no_kernel_of_any_codec_spills(cuda: FakeCuda, case: Case) -> None:
    check_cubins(cuda, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in MATRIX if case.net != "128"], ids=lambda case: case.label)
def test_steps_of_any_codec_compute_what_their_graphs_do(cuda: FakeCuda, case: Case) -> None:
    check_numerics(cuda, case)
