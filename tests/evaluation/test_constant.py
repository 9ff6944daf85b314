"""The control: no single answer is better than it by any metric or in any field, and long texts do not take minutes."""

import json
from random import Random

from phi3v.evaluation import constant
from phi3v.evaluation.check_constant import check_constant
from phi3v.evaluation.constant import best_constant, constant_columns
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.headline import better_fields
from phi3v.evaluation.intervals import mean
from phi3v.evaluation.kinds import choose_scoring
from phi3v.evaluation.metric_table import metric_table
from phi3v.evaluation.row_scores import row_score, score_rows


def test_each_metric_has_the_best_of_three_answers_as_its_control():
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
