"""Deep calls must not map and unmap a chunk of the interpreter's stack each."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import pytest

from xconv_fx.stack_room import with_stack_room

CALLS = 300
DEPTHS = range(120)


def leaf(x: int = 0) -> None:
    # Locals of a known size: its frame is larger than one of `at`, so that one of the depths leaves no room for it.
    a = b = c = d = e = f = g = h = i = j = k = m = n = o = p = q = r = s = t = u = v = w = y = z = x  # noqa: F841


def faults_of_calls() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        leaf()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def most_faults(depths: range = DEPTHS) -> int:
    """The page faults of `CALLS` calls from the depth where they cause most."""

    def at(depth: int) -> int:
        # Locals of a known size: the depths together span more than a chunk.
        a = b = c = d = e = f = g = h = i = j = k = m = n = o = p = q = depth  # noqa: F841
        return at(depth - 1) if depth else faults_of_calls()

    return max(at(depth) for depth in depths)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames are not kept in chunks")
def test_calls_beyond_the_end_of_a_chunk_do_not_map_one_each():
    assert most_faults() >= CALLS, "no depth of these ends at a chunk: the test proves nothing"
    assert with_stack_room(most_faults)() < CALLS // 10


def test_a_function_with_room_is_called_like_before():
    def total(first: int, *more: int, scale: int = 1) -> int:
        """A sum."""
        return (first + sum(more)) * scale

    roomy: Callable[..., int] = with_stack_room(total)
    assert roomy(1, 2, 3, scale=2) == 12
    assert (roomy.__name__, roomy.__doc__) == ("total", "A sum.")
    with pytest.raises(TypeError, match="total"):
        roomy()
