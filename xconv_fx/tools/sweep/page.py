"""A frontier as one page for a browser, which loads nothing: style, script and data are in the file.

`page.html` is the frame, `page.css` its style for light and dark, `page.js` draws the charts and the table of residuals
from the data. The table of budgets is written here, and is there without JavaScript as well. A content security policy
forbids the page to fetch anything.
"""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from string import Template

from xconv_fx import __version__
from xconv_fx.plan.report import duration

from .data import page_data
from .frontier import Frontier, Point
from .table import COLUMNS, cells_of


def to_html(frontier: Frontier, title: str, selected: int) -> str:
    """The page; `selected` is the index of the point that it opens with."""
    points = frontier.points
    left_out = "".join(f"<li>{escape(reason)}</li>" for reason in frontier.left_out)
    # Inside a script element nothing but "</" ends the text; as an escape it is the same JSON.
    data = json.dumps(page_data(frontier), separators=(",", ":"), sort_keys=True).replace("<", "\\u003c")
    return Template(_part("page.html")).substitute(
        title=escape(title),
        subtitle=f"A plain step takes {duration(points[-1].seconds)} by prediction; times are in addition to that.",
        style=_part("page.css"),
        script=_part("page.js"),
        data=data,
        points=_table(points),
        left_out=f'<ul class="quiet">Left out: {left_out}</ul>' if left_out else "",
        last=len(points) - 1,
        selected=selected,
        version=__version__,
    )


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _table(points: tuple[Point, ...]) -> str:
    """The points as an HTML table."""
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells_of(point))}</tr>" for point in points)
    return f'<table id="points"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
