"""Kernels that are generated for CUDA: compiled for GPUs that are not there, and run by Triton's interpreter."""

from __future__ import annotations

import pytest
from helpers.fake_cuda import FakeCuda
from helpers.fake_cuda.cases import MATRIX, UNITS, forced
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
