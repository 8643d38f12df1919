"""What the model is called with: tensors that the caller holds for the whole step, whichever of its graphs read them.

A graph that normalises the images before a break has no backward, and no plan; a mask may be read by the last of
several graphs alone. All of them are alive while any graph runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from xconv_fx import hooks
from xconv_fx.hooks.pytree import tree_leaves


class _Local(threading.local):
    """The arguments of the call that goes on in this thread."""

    arguments: Any = ()


_local = _Local()


@contextlib.contextmanager
def called_with(arguments: Any) -> Iterator[None]:
    """Within this context a model is called with these arguments."""
    outer, _local.arguments = _local.arguments, arguments
    try:
        yield
    finally:
        _local.arguments = outer


def unread(gm: fx.GraphModule) -> Mapping[int, int]:
    """Bytes of the call's arguments that are no inputs of a Dynamo graph, which is compiled now, by their number.

    A storage counts once. By number, because graphs of one step may be compiled in different calls.
    """
    seen = {hooks.storage_of(value) for value in hooks.examples(gm)}
    found: dict[int, int] = {}
    for number, value in enumerate(tree_leaves(_local.arguments)):
        if isinstance(value, Tensor) and (key := hooks.storage_of(value)) not in seen:
            seen.add(key)
            found[number] = value.untyped_storage().nbytes()
    return found
