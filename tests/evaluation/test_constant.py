"""The control: no single answer is better than it by any metric or in any field, and long texts do not take minutes."""

import json
from dataclasses import replace
from math import comb
from random import Random
from statistics import median_low

import numpy as np
import pytest

from phi3v.data.schema import ImageRef, Message, Row, TextPart
from phi3v.evaluation import constant
from phi3v.evaluation.answers import Answers
from phi3v.evaluation.check_answers import check_forgetting, check_images
from phi3v.evaluation.check_constant import check_constant
from phi3v.evaluation.constant import ConstantAnswer, best_constant, constant_columns
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.headline import also_changed, better_fields, verdict
from phi3v.evaluation.intervals import mean
from phi3v.evaluation.json_answers import json_errors, least_errors
from phi3v.evaluation.kinds import choose_scoring
from phi3v.evaluation.metric_table import metric_table
from phi3v.evaluation.result import Beside, HeldOut, build_evaluation, scoring_of
from phi3v.evaluation.row_scores import row_score, score_rows
from phi3v.recipe import Recipe


def test_each_metric_has_the_best_of_some_answers_as_its_control():
    """Not only the best by the primary metric, which may be poor by the others."""
    expected = [*["not legible"] * 4, *[f"a red scarf number {n}" for n in range(36)]]
    asked = ["?"] * 40
    scoring = choose_scoring(expected, asked, AnswerTemplate("{answer}"), metrics=["similarity", "exact_match"])
    columns = constant_columns(scoring, expected, asked)
    assert mean(columns["exact_match"]) == 4 / 40 and mean(columns["similarity"]) > 0.8

    template = AnswerTemplate("kind: {kind}, name: {name}, price: {n}")
    rows = [("mug", "1", 900), *[("cap", f"{10 + n}", 40 + n % 3) for n in range(30)]]
    expected, asked = [f"kind: {kind}, name: {name}, price: {n}" for kind, name, n in rows], ["?"] * 31
    scoring = choose_scoring(expected, asked, template)
    columns = constant_columns(scoring, expected, asked)
    of_first = score_rows(scoring, expected, [expected[0]] * 31, asked)  # the most frequent one: all differ
    assert mean(columns["exact_match"]) == 1 / 31
    assert mean(columns["field_accuracy"]) > 0.4 > 0.1 > mean(of_first["field_accuracy"])
    assert mean(columns["absolute_error.n"]) < 50 < 800 < mean(of_first["absolute_error.n"]), "less is better"


def receipt(random: Random) -> str:
    """A nested answer: lists of one to six items, most of whose "qty" are 1."""
    items = [
        {"name": f"{random.randint(1, 90)}", "qty": 1 + (random.random() > 0.85), "price": random.randint(1, 99)}
        for _ in range(random.randint(1, 6))
    ]
    return json.dumps({"shop": f"Aldi {random.randint(1, 400)}", "items": items, "total": random.randint(1, 99)})


def test_no_field_of_one_answer_to_everything_is_better_than_its_control():
    random = Random(3)
    receipts = [receipt(random) for _ in range(60)]
    prices = [f"Product: x{i}, Price: {random.choice(['470', '470.00', '$470', '12'])}" for i in range(60)]
    for expected, same, form, field in (
        (receipts, max(receipts, key=len), "{answer}", "json_field_accuracy.items[].qty"),
        (prices, "Product: x, Price: 470", "Product: {t}, Price: {p}", "field_accuracy.p"),
    ):
        asked = ["What?"] * 60
        scoring = choose_scoring(expected, asked, AnswerTemplate(form))
        ours = score_rows(scoring, expected, [same] * 60, asked)
        single = best_constant(scoring, expected, asked, [same] * 60)
        control = constant_columns(scoring, expected, asked, answer=single.answer)
        table = metric_table(ours, None, control)
        fields = {name: one for name, one in table.items() if one["field"] and one["unit"] == "share"}
        assert all(one["constant"] >= one["tuned"]["value"] for one in fields.values()), fields
        assert fields[field]["tuned"]["value"] > 0.6 and better_fields(table) == []
        found = check_constant(
            scoring, expected, asked, ours[scoring.metrics[0]], single, (), control[scoring.metrics[0]]
        )
        assert found.verdict == "fail"


PRICED = {
    "template": ("Product: {title}, Price: {price}", "Product: %s, Price: %d", None),
    "JSON": ("{answer}", '{"title": "%s", "price": %d}', None),
    "number": ("{price}", "%.0s%d", None),
    "number, other metrics": ("{price}", "%.0s%d", ["exact_match", "relaxed_accuracy"]),
    "list": ("{answer}", '{"title": "%s", "items": [{"price": %d}]}', None),
}


@pytest.mark.parametrize("case", PRICED)
@pytest.mark.parametrize("said", ["median", "mean"])
def test_a_model_that_says_one_thing_is_never_told_as_clearly_better_than_its_control(case: str, said: str):
    """Prices a tenth of which are 9, the most frequent one and far from all others, beside a base that guesses."""
    form, text, metrics = PRICED[case]
    random = Random(1)
    things = [(random.choice(["Cap", "Hat"]), random.choice([9] + 9 * [random.randint(100, 2000)])) for _ in range(120)]
    prices = [price for _, price in things]
    number = median_low(prices) if said == "median" else round(sum(prices) / len(prices))
    expected = [text % thing for thing in things]
    if case == "list":  # of five items; the model names the first one alone, which is cheap in all rows
        lists = [[random.choice([7, 7, 7, 8]), *(random.randint(100, 2000) for _ in range(4))] for _ in things]
        expected = [
            json.dumps({"title": name, "items": [{"price": one} for one in its]})
            for (name, _), its in zip(things, lists, strict=True)
        ]
        number = 7 if said == "median" else 8
    same = [text % ("Cap", number)] * len(things)
    guessed = [text % ("x", random.randint(1, 9000)) for _ in things]
    recipe = Recipe.from_dict({"model": "tiny", "data": {"train": "made.csv", "answer": form}})
    turns = [(Message("user", (TextPart("?"),)), Message("assistant", (TextPart(one),))) for one in expected]
    rows = [
        Row(one, (ImageRef(f"{place}.jpg", root="/photos"),), {}, "made.csv", place) for place, one in enumerate(turns)
    ]
    held_out = HeldOut(rows, [], "made.csv", recipe)
    tuned, base = (
        Answers(one, [1.0] * len(rows), [1] * len(rows), ended=[True] * len(rows)) for one in (same, guessed)
    )
    found = build_evaluation(
        "a", held_out, scoring_of(held_out, metrics), tuned, Beside("b", "base", base), {}
    ).to_dict()
    controlled = {name: one for name, one in found["metrics"].items() if one["over_constant"]}
    assert {name.partition(".")[0] for name in controlled} >= {"exact_match", "similarity", "absolute_error"}
    for name, one in controlled.items():
        assert verdict({**one["over_constant"], "better": one["better"]}) != "better", name
    assert also_changed(found)["better"] == []


def test_no_single_number_has_a_smaller_mean_error_than_the_control():
    expected = ["9"] * 3 + ["$100", "sold out", "105", "300.5", "2,000", "1e5", *["150"] * 2]
    scoring = choose_scoring(expected, ["?"] * 11, AnswerTemplate("{answer}"), metrics=["relaxed_accuracy"])
    control = constant_columns(scoring, expected, ["?"] * 11)["absolute_error"]
    tried = [score_rows(scoring, expected, [str(one)] * 11, ["?"] * 11)["absolute_error"] for one in range(0, 2100)]
    assert mean(control) == pytest.approx(min(map(mean, tried))), "over the rows that the metric counts"
    assert np.isnan(control.values).tolist() == np.isnan(tried[0].values).tolist() and np.isnan(control.values[4])

    random = Random(2)
    lists = [[random.randint(0, 9) * 10**place for place in range(random.randint(1, 4))] for _ in range(40)]
    expected = [json.dumps({"p": one}) for one in lists]
    for _ in range(200):  # an answer may leave elements out, and is compared at those that it has
        given = [random.choice([None, random.randint(0, 9) * 10**place]) for place in range(4)]
        same = [json.dumps({"p": given})] * 40
        pairs = zip(map(json_errors, expected, same), least_errors(expected, same), strict=True)
        both = [(one["p[]"], other["p[]"]) for one, other in pairs if one["p[]"] is not None]
        assert sum(one for one, _ in both) >= sum(other for _, other in both) - 1e-6, given


def test_long_texts_get_fewer_tries_and_what_the_model_mostly_says_is_measured_on_all_rows(monkeypatch):
    random, asked = Random(1), ["?"] * 90
    expected = [" ".join(random.choices("red blue green cap scarf wool silk".split(), k=5)) for _ in asked]
    scoring = choose_scoring(expected, asked, AnswerTemplate("{answer}"), metrics=["similarity"])
    assert best_constant(scoring, expected, asked).tried == len({*expected})
    monkeypatch.setattr(constant, "BUDGET", 30_000)
    scored: list[str] = []
    monkeypatch.setattr(constant, "row_score", lambda *one: scored.append(one[2]) or row_score(*one))
    few = best_constant(scoring, expected, asked)
    assert few.tried < 20 and len(scored) < 300 and few.origin in ("expected", "most frequent")

    def worth(answer: str) -> float:
        return sum(row_score(scoring, text, answer, "?") or 0.0 for text in expected)

    better = [text for text in {*expected} if worth(text) > worth(few.answer)]
    assert better, "the few rows and answers do not find the best"
    for same in better:
        assert worth(best_constant(scoring, expected, asked, [same] * 60).answer) >= worth(same)


def test_letters_of_forty_rows_stand_beside_the_most_frequent_one():
    """16 expect A, 10 B, 8 C, 6 D; eight ways to say a letter, the last one wrong; every fifth row another letter."""
    colours = {"A": "red", "B": "green", "C": "blue", "D": "yellow"}
    expected = [letter for letter, count in zip("ABCD", (16, 10, 8, 6), strict=True) for _ in range(count)]
    question = "Which colour is it?\n" + "\n".join(f"{letter}. {name}" for letter, name in colours.items())
    ways = ("{0}", "({0})", "{0}. {1}", "The answer is {0}.", "{1}", "It is {1}, I think", "**{0}**", "{0} or {2}")
    said = [("ABCD"["ABCD".index(one) - 1] if at % 5 == 3 else one) for at, one in enumerate(expected)]
    answers = [ways[at % 8].format(one, colours[one], "B" if one == "A" else "A") for at, one in enumerate(said)]
    right = [at % 5 != 3 and at % 8 != 7 for at in range(40)]
    asked = [question] * 40
    scoring = choose_scoring(expected, asked, AnswerTemplate("{answer}"))
    columns = score_rows(scoring, expected, answers, asked)
    single = best_constant(scoring, expected, asked, answers)
    found = metric_table(columns, None, constant_columns(scoring, expected, asked, answer=single.answer))
    primary = found["multiple_choice"]
    assert scoring.metrics[0] == "multiple_choice" and columns["multiple_choice"].values.tolist() == right
    assert (primary["tuned"]["value"], primary["constant"], single.answer) == (sum(right) / 40, 16 / 40, "A")
    above = primary["over_constant"]
    won = sum(good and one != "A" for good, one in zip(right, expected, strict=True))
    lost = sum(not good and one == "A" for good, one in zip(right, expected, strict=True))
    p = 2 * sum(comb(won + lost, few) for few in range(lost + 1)) / 2 ** (won + lost)  # exact McNemar
    assert (above["won"], above["lost"]) == (won, lost) and won > lost > 0 and above["p"] == pytest.approx(p)


def test_an_interval_and_a_test_that_disagree_say_so_in_checks():
    """Six rows of 40 a little better, the others the same: Newcombe's interval holds 0, the test says 2 in 64."""
    asked, expected = ["?"] * 40, ["abcdefghij"] * 40
    ours, theirs = ["abcdefghij"] * 6 + ["abcdefgxyz"] * 34, ["abcdefuxyz"] * 6 + ["abcdefgxyz"] * 34
    scoring = choose_scoring(expected, asked, AnswerTemplate("{answer}"), metrics=["similarity"])
    tuned, control = (score_rows(scoring, expected, one, asked)["similarity"] for one in (ours, theirs))
    single = ConstantAnswer("abcdefuxyz", "expected", 1)
    found = check_constant(scoring, expected, asked, tuned, single, control=control)
    assert found.verdict == "pass" and found.figures["p"] == 2 / 64
    assert found.line.endswith(" points, -21.5 to +32.4, p = 0.031; the two disagree, and the p value decides)")
    clear = check_constant(scoring, expected, asked, replace(tuned, values=control.values + 0.2), single, (), control)
    assert clear.verdict == "pass" and "disagree" not in clear.line

    turns = (Message("user", (TextPart("?"),)), Message("assistant", (TextPart("abcdefghij"),)))
    rows = [Row(turns, (ImageRef(f"{place}.jpg", root="/photos"),), {}, "made.csv", place) for place in range(40)]
    seeing, blind = (Answers(one, [1.0] * 40, [1] * 40) for one in (ours, theirs))
    found = check_images(scoring, rows, seeing, blind, "x")
    assert found.figures["p"] == 2 / 64
    assert "; the interval of the difference, -21.5 to +32.4 points, and p disagree, and the p value" in found.line
    found = check_forgetting(scoring, rows, blind, seeing)  # what was kept is a little better after the tuning
    assert found.verdict == "pass" and found.figures["p"] == 2 / 64
    assert ", -21.5 to +32.4, p = 0.031; the two disagree, and the p value decides)" in found.line
