"""The page of a frontier, read by a parser and opened in a browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from xconv_fx.tools.sweep.page import to_html
from xconv_fx.units import format_size

TITLE = "nets.py:<build> & more"


class Page(HTMLParser):
    """What a page has: tags with their attributes, rows of its tables, and the text of its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text: dict[str, str] = {}
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open = tag
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.open in ("td", "th"):
            self.rows[-1].append(data)
        self.text[self.open] = self.text.get(self.open, "") + data

    def handle_endtag(self, tag):
        self.open = ""

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(found):
    return to_html(found, TITLE, found.selected)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_table_of_budgets_is_in_the_page(page, found):
    head, *rows = page.rows
    assert head == ["budget", "peak", "time", "noise", "slices"]
    assert [row[1] for row in rows] == [format_size(point.peak) for point in found.points]
    assert rows[-1][0] == "none" and page.text["h1"] == TITLE


def test_the_data_has_every_residual(html, found):
    text = re.search(r'id="data">(.*?)</script>', html, re.DOTALL)
    points = json.loads(text[1])["points"]
    for point, shown in zip(found.points, points, strict=True):
        (graph,), (plan,) = shown["graphs"], point.plans
        assert [row["before"] for row in graph["rows"]] == [choice.bytes_before for choice in plan.choices]
        assert len(graph["memory"]["residuals"]) == len(plan.choices)


def test_nothing_is_loaded(page, html):
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base") and not {"src", "href"} & set(attributes)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}
    (policy,) = [a["content"] for a in page.attributes("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policy


def test_controls_have_labels(page):
    labelled = {attributes.get("for") for attributes in page.attributes("label")}
    assert {a["id"] for tag in ("input", "select") for a in page.attributes(tag)} <= labelled
    assert page.attributes("html") == [{"lang": "en"}]


def test_a_name_of_a_layer_does_not_end_the_script(found):
    from dataclasses import replace

    point = found.points[0]
    choices = tuple(replace(choice, layer="</script><b>") for choice in point.plans[0].choices)
    named = replace(found, points=(replace(point, plans=(replace(point.plans[0], choices=choices),)), found.points[-1]))
    assert not Page(to_html(named, "x", 0)).attributes("b")


@pytest.fixture(scope="module")
def browser(html, tmp_path_factory):
    """Headless Chromium with the page open."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser: install chromium and chromedriver")
    folder = tmp_path_factory.mktemp("page")
    (folder / "frontier.html").write_text(html, encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # A browser of its own, which asks nothing of anybody: neither for updates nor for its makers' services.
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", f"user-data-dir={folder / 'profile'}",
                 "window-size=1200,1600"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.get("about:blank")
    # What the browser's own first page asked for.
    opened.get_log("performance")
    opened.get((folder / "frontier.html").as_uri())
    yield opened
    opened.quit()


def _all(browser, selector):
    return browser.find_elements("css selector", selector)


def _column(browser, number):
    return [cell.text for cell in _all(browser, f"#residuals tbody td:nth-child({number})")]


def test_a_browser_shows_charts_and_table_and_fetches_nothing(browser, found):
    assert len(_all(browser, "#time-chart circle")) == len(_all(browser, "#noise-chart circle")) == len(found.points)
    (plan,) = found.points[found.selected].plans
    assert sorted(_column(browser, 2)) == sorted(choice.residual for choice in plan.choices)
    areas = _all(browser, "#memory-chart path.residual")
    assert 0 < len(areas) <= len(plan.choices) and len({area.get_attribute("style") for area in areas}) == len(areas)
    assert format_size(plan.predicted_peak) in browser.find_element("id", "readout").text
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert asked and all(url.startswith("file:///") and url.endswith("/frontier.html") for url in asked)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def _by_number(name):
    """Names in the order in which people count: relu_2 before relu_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def test_a_heading_sorts(browser, found):
    (plan,) = found.points[found.selected].plans
    names = sorted((choice.residual for choice in plan.choices), key=_by_number)
    heading = "#residuals th:nth-child(2) button"
    browser.find_element("css selector", heading).click()
    assert _column(browser, 2) == names
    # The heading has kept the focus: a key is enough.
    browser.switch_to.active_element.send_keys("\n")
    assert _column(browser, 2) == names[::-1]
    browser.find_element("css selector", "#residuals th:nth-child(7) button").click()
    assert _column(browser, 7) == [
        format_size(c.bytes_before) for c in sorted(plan.choices, key=lambda c: -c.bytes_before)
    ]


def test_the_slider_and_the_points_choose_a_budget(browser, found):
    from selenium.webdriver.common.keys import Keys

    slider = browser.find_element("id", "budget")
    slider.send_keys(Keys.HOME)
    lowest = found.points[0]
    assert format_size(lowest.peak) in browser.find_element("id", "facts").text
    assert sorted(filter(None, _column(browser, 4))) == sorted(c.codec for c in lowest.plans[0].choices)
    browser.find_element("css selector", "#points tbody tr:last-child").click()
    assert set(_column(browser, 4)) == {"keep"} and slider.get_attribute("value") == str(len(found.points) - 1)
    browser.find_element("css selector", "#time-chart circle[tabindex='0']").send_keys(Keys.ARROW_LEFT)
    assert slider.get_attribute("value") == str(len(found.points) - 2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_scheme(browser, scheme):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    paper, ink = (
        browser.execute_script(f"return getComputedStyle(document.body).{name}")
        for name in ("backgroundColor", "color")
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (paper, ink)]
    assert (light[0] > light[1]) == (scheme == "light")
