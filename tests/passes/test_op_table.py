"""The table of operations: its rows make sense, and what they say is so."""

from __future__ import annotations

import pytest
import torch
from helpers.storage import way
from helpers.tracing import run_joint, run_pair, trace

from xconv_fx.passes import op_table
from xconv_fx.passes.batch_rules import RULES
from xconv_fx.passes.op_table import PROPERTIES, ROWS, Row, batch_rule, operators_with, table, target_has

aten = torch.ops.aten


def test_every_row_names_operators_and_rules_that_there_are():
    assert len(table()) > 100
    assert {row.batch for row in ROWS} - {""} == set(RULES)
    assert {name for row in ROWS for name in row.holds.split()} == set(PROPERTIES)


def test_rows_of_one_operator_add_up():
    assert target_has(aten.sum.default, "linear") and target_has(aten.sum.default, "reduction")
    assert target_has(aten.amax.default, "reduction") and not target_has(aten.amax.default, "linear")
    assert batch_rule(aten.mm.default) == "product" == batch_rule(aten.mm.out)
    assert not target_has(torch.relu, "affine") and batch_rule(torch.relu) == ""


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row("add.Tensor", "linaer"), "no such property as"),
        (Row("cat", batch="first dim"), "the batch rule is 'beside along'"),
    ],
)
def test_rows_that_contradict_are_refused(monkeypatch, row, reason):
    monkeypatch.setattr(op_table, "ROWS", (*ROWS, row))
    with pytest.raises(ValueError, match=reason):
        table.__wrapped__()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64)


UNARY = {
    aten.neg.default: (),
    aten.clone.default: (),
    aten.sum.default: (),
    aten.mean.dim: ([1],),
    aten.constant_pad_nd.default: ([1, 2],),
    aten.mul.Scalar: (3.0,),
    torch.ops.xconv.interpolate_backward.default: ([2, 3], "linear", False, [0.0, 0.0]),
}


@pytest.mark.parametrize("target", list(UNARY), ids=str)
def test_what_is_linear_is(target):
    assert target_has(target, "linear")
    x, y = images(), images()
    torch.testing.assert_close(
        target(2 * x + y, *UNARY[target]), 2 * target(x, *UNARY[target]) + target(y, *UNARY[target])
    )


def test_what_is_bilinear_is():
    x, y, w = images(), images(), torch.randn(5, 3, 3, 3, dtype=torch.float64)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert target_has(aten.convolution.default, "bilinear") and target_has(aten.mul.Tensor, "bilinear")
    both = aten.convolution.default(2 * x + y, w, None, *geometry)
    apart = 2 * aten.convolution.default(x, w, None, *geometry) + aten.convolution.default(y, w, None, *geometry)
    torch.testing.assert_close(both, apart)


def test_what_is_a_view_shares_memory():
    x = images()
    calls = {
        aten.permute.default: ([1, 0, 2, 3],), aten.view.default: ([6, 16],), aten.expand.default: ([2, 3, 4, 4],),
        aten.slice.Tensor: (2, 0, 2), aten.select.int: (1, 0), aten.unsqueeze.default: (0,), aten.alias.default: (),
    }  # fmt: skip
    for target, arguments in calls.items():
        assert target_has(target, "view")
        assert target(x, *arguments).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert set(calls) <= set(operators_with("view"))


class Flipping(torch.nn.Module):
    """A convolution reads what a flip made of an activation that another one reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        return self.second(y) + self.third(y.flip(2))


AGAIN = {"recomputed_elementwise", "recomputed_from_codes"}


@pytest.mark.parametrize("codecs", ["exact", "quantize:4,bitmask,recompute"])
def test_what_a_flip_makes_is_made_again(codecs):
    traced = trace(Flipping().double(), torch.randn(2, 4, 8, 8, dtype=torch.float64))
    job = traced.planning(mem_budget="100%", codecs=codecs)
    flipped = next(n for n, r in enumerate(job.planning.residuals) if r.source == "flip" or "rev" in r.name)
    names = [[way(candidate) for candidate in row] for row in job.planning.candidates]
    assert "nonlinear" not in job.planning.residuals[flipped].uses
    assert AGAIN.intersection(names[flipped])
    again = tuple(
        next((place for place, name in enumerate(row) if name in AGAIN), 0) if n == flipped else 0
        for n, row in enumerate(names)
    )
    made = job.chosen(again)
    assert sum(choice.bytes_after for choice in made.plan.choices) < sum(c.bytes_before for c in made.plan.choices)
    expected = run_joint(traced.gm, traced.primals, traced.tangents())
    results, gradients = run_pair(made.pair, traced.primals, traced.tangents())
    for one, other in zip([*results, *gradients], expected, strict=True):
        assert one is other is None or torch.allclose(one, other)
