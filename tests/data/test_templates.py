"""Templates replace columns and do nothing else; values become the text that people expect."""

import datetime
import decimal
import json

import pytest

from phi3v.data.templates import Template, cell_text
from phi3v.errors import DataError


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("Product: {title}, {price}", {"title": "Scarf", "price": "470"}, "Product: Scarf, 470"),
        ("{a}{a}{b}", {"a": "x", "b": "y"}, "xxy"),
        ("{{a}} {a} {{{a}}}", {"a": "x"}, "{a} x {x}"),
        ("no columns", {}, "no columns"),
        (
            "{Full Price} {a.b} {c[0]} {d!r} {e:.2f}",
            dict.fromkeys(("Full Price", "a.b", "c[0]", "d!r", "e:.2f"), "v"),
            "v v v v v",
        ),
        ("{a}", {"a": "{b} {0.__class__} %s \\n"}, "{b} {0.__class__} %s \\n"),
    ],
)
def test_columns_are_replaced_literally(template: str, values: dict, text: str) -> None:
    assert Template(template).render(values) == text
    assert set(Template(template).columns) == set(values)


@pytest.mark.parametrize("template", ["{", "a }", "{}", "{a", "a}", "{a{b}}", "{{}"])
def test_stray_braces_are_refused(template: str) -> None:
    with pytest.raises(
        DataError, match=r"data\.answer .* character \d+.*(rename a column with braces in its name|is empty)$"
    ):
        Template(template, "answer")


@pytest.mark.parametrize("template", ["{title.__class__}", "{title[0]}", "{title:>10}", "{title!r}", "{0}", "{titel}"])
def test_an_unknown_column_names_those_that_exist(template: str) -> None:
    with pytest.raises(DataError, match="which shop.csv does not have.*; its columns are title, price"):
        Template(template, "prompt").check(["title", "price"], "shop.csv")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("007", "007"),
        (" a ", " a "),
        ("None", "None"),
        (470, "470"),
        (470.0, "470"),
        (-0.5, "-0.5"),
        (-0.0, "0"),
        (19.9, "19.9"),
        (1e-5, "0.00001"),
        (1.5e-7, "0.00000015"),
        (1e16, "10000000000000000"),
        (1.5e300, "15" + "0" * 299),
        (0.1 + 0.2, "0.30000000000000004"),
        (True, "true"),
        (False, "false"),
        (decimal.Decimal("19.90"), "19.90"),
        (decimal.Decimal("0E-10"), "0.0000000000"),
        (decimal.Decimal("-1.5E-9"), "-0.0000000015"),
        (decimal.Decimal("1E+3"), "1000"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 10, 30), "2024-05-01 10:30:00"),
        (None, None),
        (float("nan"), None),
        ("", None),
        (" \n", None),
    ],
)
def test_values_become_text(value: object, text: str | None) -> None:
    assert cell_text(value) == text
    if isinstance(value, float) and text is not None:
        assert float(text) == value


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([1], "a list"),
        ({"a": 1}, "a mapping"),
        (b"x", "bytes"),
        (datetime.timedelta(1), "a duration"),
        (1j, "a value of type c.*"),
    ],
)
def test_what_no_template_can_show_is_refused(value: object, kind: str) -> None:
    with pytest.raises(TypeError, match=f"^holds {kind}, which a template cannot show$"):
        cell_text(value)


def test_an_infinite_number_is_refused() -> None:
    for value in (float("inf"), -float("inf"), json.loads("1e400")):
        with pytest.raises(TypeError, match="a number that is infinite, or larger than any that is kept"):
            cell_text(value)
