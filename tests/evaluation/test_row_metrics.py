"""Every metric on literal rows: right, wrong and partly right, and the texts that such metrics usually trip over."""

import math
import sys

import numpy as np
import pytest

from phi3v.errors import MissingPackageError
from phi3v.evaluation import text_scores
from phi3v.evaluation.choices import listed_options, multiple_choice, named_option
from phi3v.evaluation.fields import AnswerTemplate, absolute_error, field_accuracy, relaxed_accuracy
from phi3v.evaluation.json_answers import (
    json_errors,
    json_field_accuracy,
    json_field_scores,
    json_leaves,
    json_valid,
    path_name,
)
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.row_scores import TEXT_METRICS, score_rows, scores_of_row
from phi3v.evaluation.text_scores import anls, chrf, rouge_l

ORDER = '{"item": "Scarf", "price": 470, "tags": ["red", "wool"], "shop": {"city": "Rome", "open": true}}'
LETTERS = "Which is it?\nA. a cat\nB. a dog\nC. a hot dog"


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [
        ({"a": "x", "n": "470"}, {"a": "x", "n": "470.0"}, 1.0),
        ({"a": "x", "n": "470"}, {"a": "y", "n": "$470"}, 0.5),
        ({"a": "x", "n": "470"}, {"a": "x", "n": "471"}, 0.5),
        ({"a": "x", "n": "470", "b": "z"}, {"a": " x", "n": "cheap", "b": "z"}, 2 / 3),
        ({"a": "x", "n": "470", "b": "z"}, {"a": "X", "n": "1", "b": "z"}, 1 / 3),
        ({"a": "x", "n": "sold out"}, {"a": "y", "n": " sold out"}, 0.5),  # no number there: a text
        ({"a": "x", "n": "1,290.50", "b": "", "c": "z"}, {"a": "x", "n": "1290.5", "b": "0"}, 2 / 4),
        ({"a": "x", "n": "470"}, None, 0.0),
    ],
)
def test_field_accuracy(expected, answer, score):
    assert field_accuracy(expected, answer, {"n"}) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (ORDER, 1.0),
        ('{"price": 470.0, "item": " Scarf", "shop": {"open": true, "city": "Rome"}, "tags": ["red", "wool"]}', 1.0),
        (ORDER.replace("470", "480"), 5 / 6),
        (ORDER.replace("470", '"470"'), 5 / 6),  # a text is no number
        (ORDER.replace("true", "1"), 5 / 6),  # and a number is no truth
        (ORDER.replace('"red", "wool"', '"wool", "red"'), 4 / 6),  # a list has an order
        (ORDER.replace('"red", "wool"', '"red"'), 5 / 6),
        (ORDER.replace('"red", "wool"', '"red", "wool", "warm"'), 6 / 7),  # what is invented costs
        (ORDER.replace('"shop"', '"Shop"'), 4 / 8),
        ('{"item": "Scarf"}', 1 / 6),
        ("[]", 0.0),
        (ORDER[:-1], 0.0),
        (f"```json\n{ORDER}\n```", 0.0),
        (ORDER.replace('"price": 470', '"price": 470, "price": 470'), 0.0),
    ],
)
def test_json_field_accuracy(answer, score):
    assert json_field_accuracy(ORDER, answer) == pytest.approx(score)


def test_json_where_the_expected_text_is_none():
    assert json_field_accuracy("a cat", " a cat") == 1.0 and json_field_accuracy("a cat", "{}") == 0.0
    assert json_field_accuracy("{}", "{}") == 1.0 and json_field_accuracy("{}", '{"a": 1}') == 0.0
    assert json_field_scores("a cat", "{}") == {}


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (ORDER, 1.0),
        (" [1, 2.5e3, null]\n", 1.0),
        ("7", 1.0),
        ('"a\\u00e9"', 1.0),
        ("", 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": 1,}', 0.0),
        ('{"a": NaN}', 0.0),
        ("[Infinity]", 0.0),
        ("[1e999]", 0.0),
        ('{"a": {"b": 1, "b": 1}}', 0.0),
        ('{"a": 1} {"a": 1}', 0.0),
        ('Here you are: {"a": 1}', 0.0),
        ("[" * 100_000, 0.0),
        ("9" * 10_000, 0.0),
    ],
)
def test_json_valid(text, valid):
    assert json_valid("whatever", text) == valid


def test_json_values_by_path():
    assert json_leaves('{"a": [{}, [1]], "b.c": ""}') == {("a", 0): {}, ("a", 1, 0): 1, ("b.c",): ""}
    assert [path_name(path) for path in [("a", 0, "b"), (), ("b.c", "d"), (0, "x")]] == [
        "a[].b",
        "value",
        '"b.c".d',
        "[].x",
    ]
    found = json_field_scores('{"n": 2, "items": [{"p": 1}, {"p": 2}]}', '{"n": 2, "items": [{"p": 1}], "x": 0}')
    assert found == {"n": 1.0, "items[].p": 0.5}


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B. a dog", "B"),
        ("**B**", "B"),
        ("B) because it barks", "B"),
        ("The answer is B.", "B"),
        ("Answer: (B)", "B"),
        ("The answer is B because it barks", "B"),
        ("I choose option B", "B"),
        ("It must be (B)", "B"),
        ("a dog", "B"),
        ("A dog", "B"),  # an article, then a text
        ("The answer is A dog", "B"),
        ("There is a dog in the picture.", "B"),
        ("a hot dog", "C"),  # holds "a hot dog" alone: "a dog" does not stand in it
        ("A", "A"),
        ("I think it is B", "B"),
        ("It's a small animal that barks, so B.", "B"),
        (r"\boxed{B}", "B"),
        (r"A cat would be smaller, hence $\boxed{\text{B}}$.", "B"),
        ("I think it's **B**", "B"),
        ("The answer is B, I think", "B"),
        ("The answer is B, since C and A are wrong", "B"),
        ("B. It is no vitamin C. Surely", "B"),
        ("B. A dog", "B"),
        ("A or B", None),
        ("Answer: B or C", None),
        ("The answer is B or C.", None),
        ("The answer is B, C or A.", None),
        ("The answer is (B) or (C)", None),
        ("Answer: B/C", None),
        ("B. or C.", None),
        ("B. or (C)", None),
        ("B. a dog or C. a bird", None),
        ("B. a dog\nC. a hot dog", None),
        ("The answer is B. a dog, or C", None),
        ("Not C, so I think it is B", None),  # names two
        ("It is rich in vitamin C", None),
        (r"\boxed{B} or \boxed{C}", None),
        ("I think it is D", None),  # no option
        ("(A) or (B)", None),
        ("a cat and a dog", None),
        ("D", None),  # no option
        ("a bird", None),
        ("", None),
    ],
)
def test_which_option_is_named(answer, named):
    assert named_option(answer, listed_options(LETTERS)) == named


@pytest.mark.parametrize(
    ("expected", "answer", "question", "score"),
    [
        ("B", "B", "", 1.0),
        ("B", "b.", "", 1.0),
        ("B", "The answer is (B).", "", 1.0),
        ("B", "A", "", 0.0),
        ("B", "a dog", "", 0.0),  # nobody says what B is
        ("B", "a dog", LETTERS, 1.0),
        ("a dog", "B", LETTERS, 1.0),
        ("B. a dog", "a cat", LETTERS, 0.0),
        ("B", "blue", "Is it (A) red or (B) blue?", 1.0),
        ("neither", "Neither.", LETTERS, 1.0),
    ],
)
def test_multiple_choice(expected, answer, question, score):
    assert multiple_choice(expected, answer, question) == score


def test_options_that_a_question_lists():
    assert listed_options("Is it (A) red, (B) blue or (C) none?") == {"A": "red", "B": "blue", "C": "none?"}
    assert listed_options("Which?\n(A) red\n(B) blue\nAnswer with a letter.") == {"A": "red", "B": "blue"}
    assert listed_options("A. Smith and C. Jones?") == {} and listed_options("B. x\nC. y") == {}


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [  # 1 - edits / longer length, where that is more than one half
        ("scarf", "scarf", 1.0),
        ("Scarf", " sCARF\n", 1.0),
        ("scarf", "scarfs", 5 / 6),
        ("scarf", "scar", 4 / 5),
        ("red scarf", "red  scarfs", 9 / 10),
        ("470 EUR", "470", 0.0),  # 4 of 7 are missing
        ("abcd", "abxy", 0.0),  # exactly one half
        ("abcde", "abcxy", 3 / 5),
        ("écharpe", "echarpe", 6 / 7),
        ("12:30", "12.30 h", 4 / 7),  # another mark and two more characters
        ("cat", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_anls(expected, answer, score):
    assert anls(expected, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [
        ("470", "470.00", 1.0),
        ("470", "493.5", 1.0),  # exactly 5 %
        ("470", "446.5", 1.0),
        ("470", "494", 0.0),
        ("-20", "-21", 1.0),
        ("0", "0.0", 1.0),
        ("0", "0.001", 0.0),
        ("$1,290", "1300.", 1.0),
        ("0.1", "0.105", 1.0),  # 0.105 - 0.1 is a little more than 0.005 in floats
        ("470", "about 470", 0.0),
        ("Yes", "yes.", 1.0),
        ("12", "", 0.0),
    ],
)
def test_relaxed_accuracy(expected, answer, score):
    assert relaxed_accuracy(expected, answer) == score


@pytest.mark.parametrize(
    ("expected", "answer", "error"),
    [
        ("470", "480", 10.0),
        ("-1", "1", 2.0),
        ("1,290.50", "$1290", 0.5),
        ("3", "3", 0.0),
        ("470", "480.", 10.0),
        ("3", "x", None),
        ("x", "3", None),
    ],
)
def test_absolute_error(expected, answer, error):
    assert absolute_error(expected, answer) == error and absolute_error(expected, None) is None


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [  # 2 * common / (words + words)
        ("a red wool scarf", "A red wool scarf.", 1.0),
        ("a red wool scarf", "a wool scarf", 6 / 7),
        ("a red wool scarf", "scarf wool red a", 2 / 8),  # one word stays in order
        ("a red wool scarf", "a blue cotton scarf", 4 / 8),
        ("a red scarf", "a red scarf with a fringe", 6 / 9),
        ("rouge écharpe", "écharpe", 2 / 3),  # letters of any script are letters
        ("красный шарф", "шарф красный", 2 / 4),
        ("a cat", "two dogs", 0.0),
        ("!", "!", 1.0),
        ("!", "?", 0.0),
        ("", "", 1.0),
        ("a cat", "", 0.0),
    ],
)
def test_rouge_l(expected, answer, score):
    assert rouge_l(expected, answer) == pytest.approx(score)


def test_words_of_rouge_are_the_librarys_own_on_plain_text():
    from rouge_score.tokenizers import DefaultTokenizer

    for text in ("A red-ish  scarf, 4.70 EUR_x!", "", "l'amour 'tis", "tab\tand\nline"):
        assert text_scores._Words().tokenize(text) == DefaultTokenizer().tokenize(text)


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [  # F2 = 5 * precision * recall / (4 * precision + recall) of both as means over the lengths
        ("abc", "abc", 1.0),
        ("abc", "abd", (2 / 3 + 1 / 2 + 0) / 3),
        ("ab", "abab", 5 * (5 / 12) / (4 * (5 / 12) + 1)),  # precision 2/4 and 1/3, recall 1
        ("abab", "ab", 5 * (5 / 12) / (4 + 5 / 12)),  # forgotten text costs more than invented text
        ("abab", "abxx", (5 * 0.5 / 5 + 1 / 3 + 0 + 0) / 4),  # as long: precision is recall, 2/4 and 1/3
        ("aa", "a", 5 * 0.5 / 4.5),  # of runs of 2 none is possible: one length counts
        ("a b c", "abc", 1.0),  # white space aside
        ("abc", "xyz", 0.0),
        ("", "", 1.0),
        ("abc", "", 0.0),
    ],
)
def test_chrf(expected, answer, score):
    assert chrf(expected, answer) == pytest.approx(score, abs=1e-6)


def test_metrics_of_two_texts_stay_between_0_and_1_and_know_an_equal_text():
    texts = [ORDER, "a red wool scarf", "470", "B", "", "écharpe\n rouge", "[1, 2", "😀", "红色的围巾"]
    for name, score in TEXT_METRICS.items():
        for expected in texts:
            for answer in texts:
                assert 0.0 <= score(expected, answer) <= 1.0, (name, expected, answer)
            if name != "json_valid":
                assert score(expected, expected) == pytest.approx(1.0), (name, expected)


def test_a_package_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr(text_scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError) as caught:
        chrf("a", "a")
    assert str(caught.value) == (
        'the metric chrf needs sacrebleu, which is not installed: pip install "phi3v[metrics]"'
    )


def test_scores_with_partial_credit_have_five_literal_cases_between_0_and_1():
    for test in (test_field_accuracy, test_json_field_accuracy, test_anls, test_rouge_l, test_chrf):
        [mark] = [mark for mark in test.pytestmark if mark.name == "parametrize"]
        assert sum(0.0 < case[-1] < 1.0 for case in mark.args[1]) >= 5, test.__name__


def scoring(*metrics: str, template: str = "{answer}", numeric: tuple[str, ...] = ()) -> Scoring:
    return Scoring("text", "", metrics, AnswerTemplate(template), frozenset(numeric))


def test_columns_of_a_template():
    expected = ["a: x, n: 1", "a: y, n: 2", "no form"]
    answers = ["a: x, n: 3", "nonsense", "no form"]
    chosen = scoring("exact_match", "field_accuracy", template="a: {a}, n: {n}", numeric=("n",))
    found = score_rows(chosen, expected, answers, [""] * 3, losses=[3.0, 8.0, math.nan], tokens=[3, 4, 0])
    none = math.nan
    wanted = {
        "exact_match": [0, 0, 1],
        "field_accuracy": [0.5, 0, none],  # a row without the form has no fields
        "well_formed": [1, 0, none],
        "field_accuracy.a": [1, 0, none],
        "field_accuracy.n": [0, 0, none],
        "absolute_error.n": [2, none, none],
        "loss": [1, 2, none],
    }
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name].values, values, err_msg=name)
    assert scores_of_row(found, 1) == {
        "exact_match": 0.0,
        "field_accuracy": 0.0,
        "well_formed": 0.0,
        "field_accuracy.a": 0.0,
        "field_accuracy.n": 0.0,
        "absolute_error.n": None,
        "loss": 2.0,
    }
    assert (found["loss"].unit, found["loss"].better, found["exact_match"].better) == ("number", "lower", "higher")


def test_columns_of_json_numbers_and_choices():
    found = score_rows(scoring("json_field_accuracy"), ['{"a": [1, 2]}', "{}"], ['{"a": [1]}', "{}"], ["", ""])
    assert list(found)[:3] == ["json_field_accuracy", "json_field_accuracy.a[]", "absolute_error.a[]"]
    assert list(found)[3:] == ["json_field_accuracy.value"]
    np.testing.assert_array_equal(found["absolute_error.a[]"].values, [0, math.nan])
    wanted = [f'{{"p": {number}, "q": "x"}}' for number in range(19)] + ['{"p": "sold out", "q": "x"}']
    given = ['{"q": 1, "p": 20.5}'] * 18 + ['{"p": "18"}', '{"p": 3}']
    errors = score_rows(scoring("json_field_accuracy"), wanted, given, [""] * 20)
    assert [name for name in errors if name.startswith("absolute")] == ["absolute_error.p"]
    np.testing.assert_array_equal(errors["absolute_error.p"].values, [20.5 - n for n in range(18)] + [math.nan] * 2)
    assert json_errors('{"n": 2, "i": [{"p": 1}, {"p": 2}]}', '{"n": true, "i": [{"p": 4}]}') == {"n": None, "i[].p": 3}
    assert json_errors('{"n": 1}', '{"n": 1%s}' % ("0" * 400))["n"] == sys.float_info.max
    np.testing.assert_array_equal(found["json_field_accuracy.a[]"].values, [0.5, math.nan])
    found = score_rows(scoring("relaxed_accuracy"), ["100", "5"], ["104", "x"], ["", ""])
    np.testing.assert_array_equal(found["absolute_error"].values, [4, math.nan])
    found = score_rows(scoring("multiple_choice"), ["B", "B"], ["a dog", "a dog"], [LETTERS, ""])
    np.testing.assert_array_equal(found["multiple_choice"].values, [1, 0])
