from __future__ import annotations

import pytest

from xconv_fx.cost_model.noise import TRAVEL, Use


def test_how_far_an_error_travels_orders_the_uses() -> None:
    earlier = [("first", 0.2), ("second", 0.3)]
    weight, norm, other = (Use.travelling(kind, earlier).sensitivity for kind in ("weight", "norm", "other"))
    assert weight < norm < other
    assert [weight, norm, other] == pytest.approx([0, 0.5 * TRAVEL["norm"], 0.5])
    assert dict(Use.travelling("other", earlier).reaches) == dict(earlier)
    assert Use("weight", (("own", 0.1),)).sensitivity == 0.1 and Use("norm", ()).sensitivity == 0
    with pytest.raises(ValueError, match="'bias' is not one of weight, scale, norm, other"):
        Use.travelling("bias", earlier)
