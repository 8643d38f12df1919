"""Plans to begin a search from: everything is made again that can be, for segments of one length.

Where one value can only be made again because others are as well, from the same step on, no change of a single item
leads from one length of segments to another. So there is a start for each length. What lies between two segments is
kept: whatever an option needs that its items' own options do not give.
"""

from __future__ import annotations

from collections.abc import Iterator

from .memory import Option, Problem


def segmented(problem: Problem) -> Iterator[list[int]]:
    """A legal plan for each length of segments that there is, the shortest first."""
    lengths = {option.segment for item in problem.items for option in item.options}
    for length in sorted(some for some in lengths if some is not None):
        yield legal(problem, [_longest(item.options, length) for item in problem.items])


def _longest(options: tuple[Option, ...], length: int) -> int:
    """The place of the last option for segments of this length, or the longest below; 0 where there is none."""
    places = [(option.segment, place) for place, option in enumerate(options) if option.segment is not None]
    return max((one for one in places if one[0] <= length), default=(0, 0))[1]


def legal(problem: Problem, choice: list[int]) -> list[int]:
    """The plan with "keep" (option 0) for what others need, where it is not what they need; or else for them."""
    choice, waiting = list(choice), list(range(len(choice)))
    while waiting:
        item = waiting.pop()
        for other, allowed in problem.items[item].options[choice[item]].needs:
            if choice[other] in allowed:
                continue
            if 0 not in allowed:
                choice[item] = 0
                break
            choice[other] = 0
    return choice
