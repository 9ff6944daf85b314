"""Scores on strings: literal cases with partial credit, and the places where answers lose their form."""

import math

import numpy as np
import pytest

from phi3v.errors import ConfigError, DataError
from phi3v.evaluation.fields import (
    AnswerTemplate,
    choose_numeric_fields,
    field_is_right,
    looks_numeric,
    parse_number,
)
from phi3v.evaluation.intervals import estimate, shares_of_rows
from phi3v.evaluation.metrics import exact_match, majority_fields, score_answers
from phi3v.evaluation.number_texts import value_stands_in
from phi3v.evaluation.row_scores import Column
from phi3v.evaluation.shares import majority_answer, wilson_interval
from phi3v.evaluation.text_scores import text_similarity

PRODUCT = AnswerTemplate("Product: {title}, Category: {category3_code}, Full Price: {full_price}")
AB = AnswerTemplate("a: {a}, b: {b}")


@pytest.mark.parametrize(
    ("expected", "answers", "hits"),
    [
        (["a cat", "a dog"], ["a cat", "a dog"], 2),
        (["a cat", "a dog"], ["a cat ", "\na dog"], 2),  # outer white space
        (["a cat", "a dog"], ["A cat", "a dog"], 1),  # case counts
        (["a cat", "a dog"], ["a  cat", "a dog"], 1),  # inner white space counts
        (["a cat", "a dog"], ["a cat.", "a"], 0),
        (["a cat", "a dog"], ["a dog", "a cat"], 0),  # rows are not exchangeable
        ([], [], 0),
    ],
)
def test_exact_match_counts_rows(expected, answers, hits):
    share = exact_match(expected, answers)
    assert (share.hits, share.total) == (hits, len(expected))


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        score_answers(["a"], [])


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("Product: Wool Scarf, Category: SCARF, Full Price: 470", ("Wool Scarf", "SCARF", "470")),
        ("  Product: Wool Scarf, Category: SCARF, Full Price: 470\n", ("Wool Scarf", "SCARF", "470")),
        ("Product: Scarf, red, Category: SCARF, Full Price: 470", ("Scarf, red", "SCARF", "470")),
        ("Product: , Category: , Full Price:", None),  # the last literal ends in a blank that the answer has lost
        ("Product: , Category: , Full Price: 1", ("", "", "1")),
        ("Product: Wool Scarf, Category: SCARF", None),
        ("product: Wool Scarf, Category: SCARF, Full Price: 470", None),
        ("The Product: Wool Scarf, Category: SCARF, Full Price: 470", None),
        ("Product: a, Full Price: 1, Category: b", None),  # order
        ("", None),
    ],
)
def test_template_read_backwards(answer, parsed):
    found = PRODUCT.parse(answer)
    assert (None if found is None else tuple(found.values())) == parsed


@pytest.mark.parametrize(
    ("template", "answer", "parsed"),
    [
        ("The digit is {digit}.", "The digit is 3.", {"digit": "3"}),
        ("The digit is {digit}.", "The digit is 3.5.", {"digit": "3.5"}),
        ("The digit is {digit}.", "The digit is 3", None),
        ("The digit is {digit}.", "The digit is .", {"digit": ""}),
        ("ab{x}ba", "aba", None),  # head and tail must not overlap
        ("{x}, again {x}", "cat, again cat", {"x": "cat"}),
        ("{x}, again {x}", "cat, again dog", None),
        ("{{{x}}}", "{cat}", {"x": "cat"}),
        ("{x}", "any text at all", {"x": "any text at all"}),
        ("{x}{y}", "cat", None),
        ("no field", "no field", None),
        ("{my column}: {a.b}", "value: 1", {"my column": "value", "a.b": "1"}),
    ],
)
def test_template_shapes(template, answer, parsed):
    assert AnswerTemplate(template).parse(answer) == parsed


def test_template_reading_takes_linear_time():
    assert AB.parse("a: " + ", b:" * 200_000) is None
    many = AnswerTemplate("".join(f"{{f{i}}} " for i in range(50)) + "end")
    assert many.parse("x " * 20_000) is None


@pytest.mark.parametrize("template", ["{", "{a", "a}", "{}"])
def test_broken_templates_are_refused_in_one_line(template):
    with pytest.raises(DataError) as caught:
        AnswerTemplate(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("470", 470.0),
        ("470.00", 470.0),
        ("470.", 470.0),  # a sentence's end
        ("$1,290.50.", 1290.5),
        ("470..", None),
        (".", None),
        ("$1,290.50", 1290.5),
        ("€ 12", 12.0),
        ("12 €", 12.0),
        ("-3", -3.0),
        ("-$3", -3.0),
        ("$-3", -3.0),
        (".5", 0.5),
        ("50%", 50.0),
        ("470,5", None),
        ("1,29", None),
        ("about 470", None),
        ("470 USD", 470.0),
        ("EUR 470", 470.0),
        ("EUR470", None),
        ("470 euros", None),
        ("$470 USD", None),
        ("$5%", None),
        ("$$5", None),
        ("\u22125", -5.0),
        ("\u2212$1,290.50", -1290.5),
        ("1\u202f290\u202f000.5", 1290000.5),
        ("1\u00a0290 €", 1290.0),
        ("1 290", None),  # a blank may part two numbers
        ("1\u00a0290\u202f000", None),
        ("1\u00a029", None),
        ("1.290,50", None),
        ("1e5", None),
        ("nan", None),
        ("inf", None),
        ("$", None),
        ("-", None),
        ("", None),
        ("9" * 400, None),
        ("$" + " " * 50_000 + "x", None),  # read in no time
    ],
)
def test_numbers(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("values", "numeric"),
    [(["470", "1,290.50"], True), (["0", "0.5"], True), (["470", "n/a"], False), (["007", "012"], False), ([], False)],
)
def test_which_columns_look_numeric(values, numeric):
    assert looks_numeric(values) is numeric


@pytest.mark.parametrize(
    ("expected", "answer", "numeric", "right"),
    [
        ("470", "470.0", True, True),
        ("470", "470.0", False, False),
        ("470", "$470", True, True),
        ("470", "471", True, False),
        ("470", None, True, False),
        ("n/a", "n/a", True, True),  # no number expected: compared as text
        ("Scarf", " Scarf ", False, True),
        ("Scarf", "scarf", False, False),
    ],
)
def test_field_is_right(expected, answer, numeric, right):
    assert field_is_right(expected, answer, numeric) is right


@pytest.mark.parametrize(
    ("expected", "answers", "hits", "error", "rows", "without"),
    [
        (["470", "100", "30"], ["470", "100", "30"], 3, 0.0, 3, 0),
        (["470", "100", "30"], ["470.00", "90", None], 1, 5.0, 2, 1),
        (["470", "100", "30"], ["480", "110", "60"], 0, 50 / 3, 3, 0),
        (["470", "100", "30"], ["cheap", "", None], 0, None, 0, 3),
        (["470", "100", "30"], ["$470", "1,000", "thirty"], 1, 450.0, 2, 1),
        (["n/a", "100"], ["5", "100"], 1, 0.0, 1, 0),  # where no number is expected there is no error to take
        ([], [], 0, None, 0, 0),
    ],
)
def test_numeric_field(expected, answers, hits, error, rows, without):
    given = ["" if answer is None else f"b: {answer}" for answer in answers]
    template = AnswerTemplate("b: {b}")
    score = score_answers([f"b: {value}" for value in expected], given, template, ["b"]).fields["b"]
    assert score.accuracy.hits == hits
    assert score.mean_absolute_error == (None if error is None else pytest.approx(error))
    assert (score.error_rows, score.not_numbers) == (rows, without)


@pytest.mark.parametrize(
    ("answers", "exact", "formed", "a", "b"),
    [
        (["a: x, b: 1", "a: y, b: 2"], 2, 2, 2, 2),
        (["a: x, b: 3", "a: y, b: 2"], 1, 2, 2, 1),
        (["a: z, b: 1", "a: z, b: 2"], 0, 2, 0, 2),
        (["a: x, b: 1", "nonsense"], 1, 1, 1, 1),
        (["a: x, b: 1.0", "a: y, b: 2"], 1, 2, 2, 2),  # the same number, another text
        (["x", "y"], 0, 0, 0, 0),  # right words, wrong form: no credit
    ],
)
def test_fields_of_templated_answers(answers, exact, formed, a, b):
    scores = score_answers(["a: x, b: 1", "a: y, b: 2"], answers, AB)
    assert scores.exact_match.hits == exact
    assert scores.well_formed.hits == formed
    assert scores.fields["a"].accuracy.hits == a
    assert scores.fields["b"].accuracy.hits == b
    assert (scores.fields["a"].numeric, scores.fields["b"].numeric) == (False, True)


@pytest.mark.parametrize(
    ("value", "answer", "numeric", "there"),
    [
        ("470", "470", True, True),
        ("470", "It costs $470.00, today.", True, True),
        ("1,290", "Price:1290.", True, True),
        ("470", "4701 or 1470", True, False),
        ("470", "1.470", True, False),
        ("sold out", "Sold out!", True, True),
        ("Wool Scarf", "a wool scarf, red", False, True),
        ("Wool Scarf", "a wool and a scarf", False, False),
        ("Cap", "a captain", False, False),
        ("", "anything", False, False),
    ],
)
def test_a_value_that_stands_in_an_answer(value, answer, numeric, there):
    assert value_stands_in(value, answer, numeric) is there


def test_right_content_out_of_form_is_counted_apart():
    expected = ["a: x, b: 1", "a: y, b: 2", "a: z, b: 3"]
    scores = score_answers(expected, ["1", "a: q, b: 2", "z costs 4"], AB)
    assert [(one.accuracy.hits, one.out_of_form) for one in scores.fields.values()] == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("one", "other", "ratio"),
    [
        ("abcd", "bcde", 0.75),
        ("a cat", "a cat", 1.0),
        ("a cat", " a cat\n", 1.0),
        ("a cat", "", 0.0),
        ("", "", 1.0),
        ("abc", "xyz", 0.0),
        ("ab", "abab", 2 * 2 / 6),
        ("a" * 300 + "b", "a" * 300, 2 * 300 / 601),  # frequent letters are not junk
    ],
)
def test_similarity(one, other, ratio):
    assert text_similarity(one, other) == pytest.approx(ratio)


def test_similarity_is_averaged_over_rows():
    assert score_answers(["abcd", "cat"], ["bcde", "cat"]).similarity == pytest.approx(0.875)


def test_free_text_has_no_fields():
    scores = score_answers(["a cat"], ["a cat"], template=None, loss=0.25)
    assert scores.fields == {} and scores.well_formed is None and scores.loss == 0.25
    assert score_answers(["ab"], ["ab"], AnswerTemplate("{a}{b}")).fields == {}


def test_no_rows_give_no_scores_and_no_error():
    scores = score_answers([], [], AB)
    assert scores.rows == 0 and scores.similarity == 0.0 and scores.fields["a"].accuracy.total == 0


def test_numeric_fields_may_be_named():
    expected = ["a: 1, b: 2"]
    assert choose_numeric_fields(expected, AB) == {"a", "b"}
    assert choose_numeric_fields(expected, AB, ["b"]) == {"b"}
    assert choose_numeric_fields(expected, AB, []) == frozenset()
    with pytest.raises(ConfigError, match="'price'.*its fields are a, b"):
        choose_numeric_fields(expected, AB, ["price"])


@pytest.mark.parametrize(
    ("expected", "answer", "hits"),
    [
        (["cat", "dog", "dog "], "dog", 2),
        (["cat", "dog"], "cat", 1),
        (["cat"], "cat", 1),
        ([" ", "cat", ""], "", 2),
        (["a", "b", "c", "b"], "b", 2),
        ([], "", 0),
    ],
)
def test_majority(expected, answer, hits):
    assert majority_answer(expected) == answer
    assert exact_match(expected, [answer] * len(expected)).hits == hits


def test_majority_of_each_field():
    shares = majority_fields(["a: x, b: 1", "a: x, b: 2", "a: y, b: 1"], AB)
    assert {name: share.hits for name, share in shares.items()} == {"a": 2, "b": 2}
    assert majority_fields(["ab"], AnswerTemplate("{a}{b}")) == {}


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [  # reference values: scipy.stats.binomtest(hits, total).proportion_ci(method="wilson")
        (0, 0, 0.0, 1.0),
        (0, 200, 0.0, 0.018845),
        (9, 10, 0.595850, 0.982124),
        (5, 10, 0.236593, 0.763407),
        (180, 200, 0.850594, 0.934330),
        (200, 200, 0.981155, 1.0),
    ],
)
def test_wilson_interval(hits, total, low, high):
    found = wilson_interval(hits, total)
    assert found == pytest.approx((low, high), abs=1e-5)
    assert 0.0 <= found[0] <= found[1] <= 1.0


def test_wilson_interval_covers_the_share_it_came_from():
    for total in (1, 2, 7, 50):
        for hits in range(total + 1):
            low, high = wilson_interval(hits, total)
            assert low <= hits / total <= high
            assert math.isclose(low + wilson_interval(total - hits, total)[1], 1.0)  # symmetric in right and wrong


def test_shares_have_the_interval_of_every_score():
    """60 rows about 20 photos are worth 20; where a photo is right in all or in none they are worth no more."""
    right = [photo % 2 == 0 for photo in range(20) for _ in range(3)]
    groups = np.repeat(np.arange(20), 3)
    expected, answers = ["a: x"] * 60, ["a: x" if one else "a: y" for one in right]
    alone, together = (
        score_answers(expected, answers, AnswerTemplate("a: {a}"), None, None, it) for it in (None, groups)
    )
    assert estimate([Column("exact_match", None, np.array(right, dtype=float), groups=groups)])[0][0].low == (
        together.exact_match.low
    )
    widths = [share.high - share.low for share in (alone.exact_match, together.exact_match)]
    assert widths[1] == pytest.approx(widths[0] * 3**0.5, rel=0.2)
    assert together.fields["a"].accuracy == together.exact_match and together.exact_match.hits == 30
    assert majority_fields([*expected[:30], *["none"] * 30], AnswerTemplate("a: {a}"), groups)["a"].total == 30
    nothing = shares_of_rows([[]])[0]
    assert (nothing.hits, nothing.total, nothing.value, nothing.low, nothing.high) == (0, 0, 0.0, 0.0, 1.0)
