"""What a compiled forward saves of its inputs is those inputs to autograd, bit for bit and by version."""

from __future__ import annotations

import pytest
import torch

from xconv_fx.hooks.saved_views import with_versions

VIEWS = {
    "itself": lambda x: x.view_as(x),
    "matrix": lambda x: x.view(2, -1),
    "part": lambda x: x[1:, ::2],
    "transposed": lambda x: x.transpose(0, 1),
}
OTHERS = {
    "a copy": lambda x: x.clone(),
    "conjugate": lambda x: x.conj(),
    "negative": lambda x: torch._neg_view(x),
    "real numbers": lambda x: torch.view_as_real(x),
}


def saved(view, x):
    """What a forward saves whose only output is a view that generated code made: one with a version of its own."""
    forward = with_versions(lambda arguments: (view(arguments[0].data),), {0: 0})
    (found,) = forward([x])
    return found


@pytest.mark.parametrize("name", [*VIEWS, *OTHERS])
def test_values_and_layout_are_those_of_the_view(name):
    view = {**VIEWS, **OTHERS}[name]
    x = torch.randn(2, 4, 6, dtype=torch.complex64)[:, 1:]
    if name == "matrix":
        x = x.contiguous()
    found, expected = saved(view, x), view(x)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize("name", VIEWS)
def test_a_change_of_the_input_is_one_of_the_view(name):
    x = torch.randn(2, 4, 6)
    found = saved(VIEWS[name], x)
    before = found._version
    x.add_(1)
    assert found._version == before + 1
