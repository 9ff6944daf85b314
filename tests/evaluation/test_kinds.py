"""Which metrics rows are scored with: by the kind of what they expect, by name, and without a package."""

from typing import get_args

import numpy as np
import pytest

from phi3v.errors import ConfigError, MissingPackageError
from phi3v.evaluation import kinds, text_scores
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.kinds import CHOSEN, METRICS, answer_kind, choose_scoring
from phi3v.evaluation.row_scores import LABELS, TEXT_METRICS, score_rows
from phi3v.recipe import Recipe
from phi3v.recipe_report import MetricName

PLAIN = AnswerTemplate("{answer}")
PRODUCT = AnswerTemplate("Product: {title}, Price: {price}")
PROSE = "A woman in a red coat walks two dogs along the river while it rains."


@pytest.mark.parametrize(
    ("expected", "template", "kind"),
    [
        (["Product: Scarf, Price: 470", "Product: Cap, Price: 1"], PRODUCT, "templated"),
        (["It is red."], AnswerTemplate("It is {colour}."), "templated"),
        (['{"a": 1}', '{"a": 2}'], PLAIN, "json"),
        (['{"a": "x"}'], AnswerTemplate('{{"a": "{a}"}}'), "json"),  # a template of JSON is JSON
        (["[1]", "[]"], PLAIN, "json"),
        (["A", "(B)", "C."], PLAIN, "multiple_choice"),
        (list("ABCDEFGHI"), PLAIN, "short"),  # the alphabet is no choice of few
        (["a", "b"], PLAIN, "short"),
        (["470", "$1,290.50", "-3"], PLAIN, "number"),
        (["007", "012"], PLAIN, "short"),  # codes
        (["red", "a wool scarf"], PLAIN, "short"),
        ([PROSE], PLAIN, "text"),
        (["one\ntwo"], PLAIN, "text"),
        (["红" * 61], PLAIN, "text"),  # one word, yet long
        (["470"] * 95 + ["n/a"] * 5, PLAIN, "number"),  # a few slips
        (["470"] * 94 + ["n/a"] * 6, PLAIN, "short"),
        (["Scarf for 470"] * 2, PRODUCT, "short"),  # rows of conversations do not follow the template
        ([], PRODUCT, "text"),
    ],
)
def test_the_kind_of_answers(expected, template, kind):
    assert answer_kind(expected, ["?"] * len(expected), template)[0] == kind


def test_options_of_the_question_make_a_choice():
    question = "Which?\nA. cat\nB. dog"
    assert answer_kind(["dog", "cat"], [question] * 2, PLAIN) == (
        "multiple_choice",
        "2 of 2 expected answers name an option",
    )
    assert answer_kind(["dog", "bird"], [question] * 2, PLAIN)[0] == "short"


@pytest.mark.parametrize("kind", CHOSEN)
def test_what_a_kind_is_scored_with(kind, monkeypatch):
    monkeypatch.setattr(kinds, "answer_kind", lambda *given: (kind, "because"))
    chosen = choose_scoring(["Product: Scarf, Price: 470"], ["?"], PRODUCT)
    assert chosen.metrics == tuple(dict.fromkeys([*CHOSEN[kind], "exact_match", "similarity"]))
    assert chosen.numeric == {"price"} and chosen.notes == ()


@pytest.mark.parametrize(("slips", "numeric"), [(0, True), (5, True), (6, False)])
def test_a_field_of_numbers_may_hold_a_few_texts(slips, numeric):
    prices = [*map(str, range(100, 200 - slips)), *["sold out"] * slips]
    expected = [f"Product: x, Price: {price}" for price in prices]
    chosen = choose_scoring(expected, ["?"] * 100, PRODUCT)
    assert chosen.numeric == ({"price"} if numeric else set())
    told = "price: 5 of 100 expected values are no numbers; they are compared as texts and have no part in the mean"
    assert [note.startswith(told) for note in chosen.notes] == [True] * (slips == 5)
    found = score_rows(chosen, expected, [text.replace("out", "OUT") + ".0" for text in expected], ["?"] * 100)
    assert found["field_accuracy.price"].values.sum() == (100 - slips if numeric else 0)
    assert not numeric or np.isnan(found["absolute_error.price"].values).sum() == slips


def test_named_metrics_come_first():
    chosen = choose_scoring(["red"], ["?"], PLAIN, metrics=["chrf", "exact_match", "chrf"])
    assert chosen.kind == "short" and chosen.metrics == ("chrf", "exact_match", "similarity")
    assert choose_scoring(["red"], ["?"], PLAIN, metrics=[]).metrics == ("exact_match", "similarity")
    with pytest.raises(ConfigError, match="'rouge' is no metric; there are exact_match"):
        choose_scoring(["red"], ["?"], PLAIN, metrics=["rouge"])
    with pytest.raises(ConfigError, match=r"field_accuracy needs an answer template .* '\{a\}\{b\}'"):
        choose_scoring(["red"], ["?"], AnswerTemplate("{a}{b}"), metrics=["field_accuracy"])


def test_a_metric_without_its_package_is_left_out_or_refused(monkeypatch):
    monkeypatch.setattr(text_scores.importlib.util, "find_spec", lambda name: None)
    chosen = choose_scoring([PROSE], ["?"], PLAIN)
    assert chosen.metrics == ("exact_match", "similarity")
    assert chosen.notes == (
        'rouge_l is left out: rouge-score is not installed, pip install "phi3v[metrics]"',
        'chrf is left out: sacrebleu is not installed, pip install "phi3v[metrics]"',
    )
    with pytest.raises(MissingPackageError, match="the metric anls needs rapidfuzz"):
        choose_scoring([PROSE], ["?"], PLAIN, metrics=["anls"])


def test_names_are_the_same_everywhere():
    assert set(get_args(MetricName)) == set(METRICS) == {*TEXT_METRICS, "field_accuracy", "multiple_choice"}
    assert set(METRICS) < set(LABELS)
    values = {"model": "m", "data": {"train": "t.csv"}, "evaluation": {"metrics": ["anls"]}}
    assert Recipe.from_dict(values).evaluation.metrics == ["anls"]
    with pytest.raises(ConfigError, match=r"evaluation\.metrics"):
        Recipe.from_dict(values, ["evaluation.metrics=[rouge]"])


def test_numbers_with_a_unit_are_told_how_they_are_compared_as_numbers() -> None:
    def notes(texts: list[str], form: str = "{answer}") -> list[str]:
        return [one for one in choose_scoring(texts, ["?"] * 20, AnswerTemplate(form)).notes if "behind them" in one]

    (told,) = notes([f"{n} kg" for n in range(19)] + ["unknown"])
    assert "'kg' behind them, compared as texts" in told and "data.answer '{number} kg'" in told
    kept = choose_scoring([f"{n} kg" for n in range(20)], ["?"] * 20, AnswerTemplate("{number} kg"))
    assert (kept.kind, kept.numeric, kept.notes) == ("templated", {"number"}, ())
    assert notes([f"{n} 000" for n in range(20)]) == notes([f"{n} {'kg lb'.split()[n % 2]}" for n in range(20)]) == []
