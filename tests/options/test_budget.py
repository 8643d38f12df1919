"""Sizes and budgets: every way to write one, and every way to get it wrong."""

from __future__ import annotations

import pytest

from xconv_fx.errors import OptionError
from xconv_fx.options.budget import Budget, parse_size
from xconv_fx.units import format_size, sufficient_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (8_000_000_000, 8_000_000_000),
        ("8000000000", 8_000_000_000),
        ("8_000_000_001", 8_000_000_001),
        ("512B", 512),
        ("512 b", 512),
        ("3kB", 3000),
        ("800MB", 800 * 10**6),
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("8G", 8 * 10**9),
        (" 1.5 TB ", 1_500_000_000_000),
        ("7.5GiB", 7 * 2**30 + 2**29),
        ("7.5 gib", 7 * 2**30 + 2**29),
        ("2Mi", 2 * 2**20),
        (".5KiB", 512),
        ("1e3MB", 10**9),
        ("1.0000000001GB", 1_000_000_000),
        # Exact where a float is not: 2**53 + 1.
        ("9007199254740993", 9007199254740993),
    ],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value",
    ["8 bananas", "", "GB", "8 GB please", "8iB", "8EB", "nan", "inf", "--8GB", "8,5GB", "60%", "1e30", "1e300TB"],
)
def test_text_that_is_no_size_says_what_is(value):
    with pytest.raises(OptionError, match=r"'8GB' or '7\.5GiB'") as caught:
        parse_size(value, option="reserve")
    assert caught.value.option == "reserve" and caught.value.value == value


@pytest.mark.parametrize("value", [True, False, 1.5, 8e9, float("nan"), None, [1], b"8GB"])
def test_other_types_are_refused(value):
    with pytest.raises(OptionError, match="write a number of bytes"):
        parse_size(value)


@pytest.mark.parametrize(("value", "reason"), [(0, "zero"), ("0GB", "zero"), ("0.1B", "zero"), (-1, "negative")])
def test_sizes_are_positive(value, reason):
    with pytest.raises(OptionError, match=reason):
        parse_size(value)


def test_zero_is_a_size_where_allowed_but_never_less():
    assert parse_size(0, allow_zero=True) == parse_size("0", allow_zero=True) == 0
    with pytest.raises(OptionError, match="negative"):
        parse_size("-1GB", allow_zero=True)


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    size = parse_size(numpy.int64(5))
    assert size == 5 and type(size) is int


@pytest.mark.parametrize(
    ("value", "resolved"), [("8GB", 8 * 10**9), (123, 123), ("60%", 600), ("100 %", 1000), ("0.55%", 5), ("1e1%", 100)]
)
def test_budget_resolves_against_the_peak_without_xconv(value, resolved):
    assert Budget.parse(value).resolve(1000) == resolved


def test_a_budget_is_never_zero_bytes():
    assert Budget.parse("0.01%").resolve(10) == 1


@pytest.mark.parametrize("value", ["0%", "150%", "-5%", "100.1%", "%", "x%", 0.6, True, "8 bananas", 0, -5, None])
def test_bad_budgets_say_what_would_work(value):
    with pytest.raises(OptionError, match=r"such as .*'?(8GB|60%)") as caught:
        Budget.parse(value)
    assert caught.value.option == "mem_budget"
    assert repr(value) in str(caught.value)


def test_budget_objects_are_checked_too():
    assert Budget.parse(Budget(fraction=0.5)) == Budget(fraction=0.5)
    for wrong in ({}, {"bytes": 1, "fraction": 0.5}, {"bytes": 0}, {"fraction": 1.5}, {"fraction": float("nan")}):
        with pytest.raises(OptionError):
            Budget(**wrong)


def test_budgets_print_as_they_are_written():
    assert str(Budget.parse("7.5GB")) == "7.50 GB"
    assert str(Budget.parse("62.5%")) == "62.5%"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1234, "1.23 kB"),
        (812_000_000, "812 MB"),
        (99_960_000, "100 MB"),
        (999_400_000, "999 MB"),
        (999_700_000, "1.00 GB"),
        (1_234_567_890, "1.23 GB"),
        (12_345_678_901, "12.3 GB"),
        (5_000_000_000_000, "5.00 TB"),
        (-1_230_000, "-1.23 MB"),
    ],
)
def test_format_size(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 999_999, 123_456_789, 3_105_000_001, 999_999_999, 10**13 + 1])
def test_a_sufficient_size_is_enough_and_not_much_more(size):
    enough = parse_size(sufficient_size(size))
    assert size <= enough <= size * 1.01


@pytest.mark.parametrize(("size", "text"), [(3_101_000_000, "3.11GB"), (2 * 10**9, "2GB"), (999_999, "1MB"), (7, "7B")])
def test_sufficient_sizes_are_short(size, text):
    assert sufficient_size(size) == text


@pytest.mark.parametrize(("value", "meant"), [("60", "60%"), ("0.6", "60%"), (" .25 ", "25%"), ("99.5", "99.5%")])
def test_a_number_that_must_be_a_share_is_refused(value, meant):
    with pytest.raises(OptionError, match=f"so few bytes hold nothing; write '{meant}'"):
        Budget.parse(value)
