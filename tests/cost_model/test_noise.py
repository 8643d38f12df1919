from __future__ import annotations

import pytest

from xconv_fx.cost_model.noise import TRAVEL, Use, sensitivity


def test_how_far_an_error_travels_orders_the_uses() -> None:
    weight, norm, other = (sensitivity([Use(kind, 0.1, upstream=0.5)]) for kind in ("weight", "norm", "other"))
    assert weight < norm < other
    assert [weight, norm, other] == pytest.approx([0.1, 0.1 + 0.5 * TRAVEL["norm"], 0.6])
    assert sensitivity([Use("weight", 0.1), Use("other", 0.0, 0.5)]) == pytest.approx(0.6)
    assert sensitivity([Use("weight", 0.1, ratio=4.0)]) == pytest.approx(0.4)
    assert sensitivity([]) == 0
    with pytest.raises(ValueError, match="'bias' is not one of weight, norm, other"):
        Use("bias", 0.1)
