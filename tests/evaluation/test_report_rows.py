"""What the report says of single rows and of their parts: marks, categories, worst and best, words, the flat table."""

import json

import numpy as np
import pytest
from report_content import HOSTILE_GROUP, make_predictions

from phi3v.evaluation.answer_files import WRITERS, writable
from phi3v.evaluation.categories import break_down, choose_categories
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.headline import how_often, in_words, verdict
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.metric_table import metric_table
from phi3v.evaluation.prediction_table import prediction_table
from phi3v.evaluation.report_rows import choose_extremes, list_rows
from phi3v.evaluation.row_scores import Column, score_rows, scores_of_row
from phi3v.evaluation.word_marks import MOST_WORDS, mark_words

PLAIN = AnswerTemplate("{answer}")


@pytest.mark.parametrize(
    ("expected", "answer", "lacks", "differs"),
    [
        ("Product: Scarf, Price: 470", "Product: Cap, Price: 470", ["Scarf"], ["Cap"]),
        ("a red wool scarf", "a scarf", ["red wool "], []),
        ("a scarf", "a  scarf!", [" "], ["  ", "!"]),
        ("赤い帽子", "青い帽子", ["赤"], ["青"]),
        ("Größe 4", "Grösse 4", ["Größe"], ["Grösse"]),
        ("same", "same", [], []),
        ("", "something", [], ["something"]),
        ("x " * MOST_WORDS, "y", [], []),
    ],
)
def test_words_that_differ(expected, answer, lacks, differs):
    left, right = mark_words(expected, answer)
    assert "".join(text for text, _ in left) == expected and "".join(text for text, _ in right) == answer
    assert [text for text, marked in left if marked] == lacks
    assert [text for text, marked in right if marked] == differs


def prediction(expected: str, row: int, question: str = "What?", **fields: str) -> dict:
    return {
        "row": row,
        "source": "/data/a.csv",
        "expected": expected,
        "question": question,
        "fields": {name: {"expected": value} for name, value in fields.items()},
        "scores": {"tuned": {"exact_match": float(row % 2)}, "base": None},
    }


def test_categories_are_values_that_few_rows_have_to_themselves():
    rows = [
        prediction("x", i, group="ab"[i % 2], twin="yz"[i % 2], half="hk"[i // 5], title=f"scarf {i}")
        for i in range(10)
    ]
    # the twin parts the rows as the group does, titles are all others
    assert choose_categories(rows) == {"group": ["a", "b"] * 5, "half": ["h"] * 5 + ["k"] * 5}
    assert choose_categories(rows[:9]) == {}  # less than five rows a value
    objects = [prediction(json.dumps({"kind": "hat" if i < 3 else "cap", "tags": [i]}), i) for i in range(12)]
    assert choose_categories(objects) == {"kind": ["hat"] * 3 + ["cap"] * 9}
    letters = [prediction("ABC"[i % 3], i, question="Which?" if i < 8 else "What?") for i in range(15)]
    assert list(choose_categories(letters)) == ["answer", "question"]
    assert choose_categories([prediction("[" * 10**5, i) for i in range(10)]) == {}
    files = [prediction(f"x {i}", i) | {"source": f"/data/{'ab'[i % 2]}/rows.csv"} for i in range(12)]
    assert choose_categories(files) == {"source": ["a/rows.csv", "b/rows.csv"] * 6}


def test_each_category_has_its_scores():
    rows = [prediction("x", i, group="a" if i < 6 else "b") for i in range(20)]
    found = break_down(rows, "exact_match")["group"]
    assert {value: one["rows"] for value, one in found.items()} == {"b": 14, "a": 6} and list(found) == ["b", "a"]
    assert found["a"]["tuned"]["value"] == 0.5 and found["a"]["tuned"]["low"] == pytest.approx(0.188, abs=0.001)
    assert found["a"]["base"] is None and found["a"]["won"] is None and found["a"]["constant"] is None
    for place, row in enumerate(rows):
        row["scores"]["base"] = {"exact_match": 0.0}
        row["image_group"] = place if place < 15 else 15
    same = Column("exact_match", None, np.array([1.0, *[0.0] * 19]))
    found = break_down(rows, "exact_match", same)["group"]
    assert found["a"]["constant"] == 1 / 6 and found["b"]["constant"] == 0
    assert found["a"]["p"] == pytest.approx(2 / 2**3) and found["a"]["won"] == 3, "6 rows, 3 of which differ"
    for row in rows[:6]:
        row["image_group"] = row["row"] // 2
    assert break_down(rows, "exact_match", same)["group"]["a"]["p"] is None, "3 photos are too few"


def test_rows_have_tags_that_menus_name():
    predictions, evaluation = make_predictions(20)
    rows, menus = list_rows(predictions, evaluation)
    assert rows[0].tags == "wrong same f0 f1 f2 c0-0"
    assert (
        rows[1].tags == "right won c0-1" and rows[2].tags == "right same c0-1" and rows[4].tags == "wrong same f0 c0-1"
    )
    turned = [one | {"scores": {"tuned": one["scores"]["base"], "base": one["scores"]["tuned"]}} for one in predictions]
    assert [row.tags.split()[1] for row in list_rows(turned, evaluation)[0][:5]] == [
        "same",
        "lost",
        "same",
        "lost",
        "same",
    ]
    assert [menu.name for menu in menus] == ["answers", "compared", "field", "group"]
    assert menus[3].choices == {"c0-0": HOSTILE_GROUP, "c0-1": "TOPS"}
    assert [one.who for one in rows[0].said] == ["expected", "before", "after"]
    other = {**evaluation, "against": "target", "base": "runs/other"}
    assert [one.who for one in list_rows(predictions, other)[0][0].said] == ["expected", "other", "test"]


def test_a_field_that_some_rows_expect_is_wrong_where_it_is_expected():
    """Keys of JSON that only every third row has: the filter's count is that of the figure, not of all other rows."""
    expected = ['{"kind": "hat", "price": 4}' if i % 3 == 0 else '{"kind": "cap"}' for i in range(12)]
    answers = [text.replace("4", "5") if i < 6 else text for i, text in enumerate(expected)]
    columns = score_rows(
        Scoring("json", "", ("json_field_accuracy",), PLAIN, frozenset()), expected, answers, [""] * 12
    )
    predictions = [
        prediction(expected[i], i) | {"scores": {"tuned": scores_of_row(columns, i), "base": None}} for i in range(12)
    ]
    predictions = [one | {"base": None, "tuned": answers[i]} for i, one in enumerate(predictions)]
    predictions = [one | {"right": answers[i] == expected[i], "images": []} for i, one in enumerate(predictions)]
    table = metric_table(columns, None, {})
    evaluation = {"primary": "json_field_accuracy", "metrics": table, "base": None, "against": None}
    rows, menus = list_rows(predictions, evaluation)
    choices = next(menu.choices for menu in menus if menu.name == "field")
    assert choices == {"f0": "kind wrong", "f1": "price wrong"}
    counts = [sum(tag in row.tags.split() for row in rows) for tag in choices]
    figures = [table[f"json_field_accuracy.{name}"]["tuned"] for name in ("kind", "price")]
    assert counts == [round(one["rows"] * (1 - one["value"])) for one in figures] == [0, 2] and figures[1]["rows"] == 4


def test_worst_and_best_rows():
    predictions, evaluation = make_predictions(30)
    worst, best = choose_extremes(predictions, evaluation["primary"], 5)
    assert worst == [0, 4, 14] and len(best) == 2 and not set(best) & {0, 2, 4, 14, 24}
    perfect = [one for one in predictions if one["right"]]
    assert choose_extremes(perfect, evaluation["primary"], 4)[0] == []
    assert choose_extremes(predictions, evaluation["primary"], 0) == ([], [])


def test_a_comparison_in_words():
    one = {"better": "higher", "unit": "share", "test": "mcnemar", "won": 191, "lost": 0, "tied": 9}
    one |= {"difference": {"value": 0.955, "low": 0.912, "high": 0.976}, "p": 6.4e-58}
    assert verdict(one) == "better" and in_words(one) == (
        "+95.5 points (95 % interval +91.2 to +97.6): 191 rows better, 0 worse, 9 the same. If neither were better, a "
        "difference as large as this would come up less than once in 1,000 times (McNemar's test, p\u00a0<\u00a00.001)."
    )
    assert verdict({**one, "better": "lower"}) == "worse" and verdict({**one, "p": 0.05}) == "no clear difference"
    assert verdict({**one, "difference": None, "p": None}) == "no clear difference"
    assert [how_often(p) for p in (1.0, 0.3, 0.0101, 0.0042, 0.00101)] == [
        "every time",
        "about 30 times in 100",
        "about once in 100",
        "about 4 times in 1,000",
        "about once in 1,000",
    ]


@pytest.mark.parametrize("base", [True, False])
def test_predictions_as_parquet(tmp_path, base):
    parquet = pytest.importorskip("pyarrow.parquet")
    predictions, _ = make_predictions(20, base)
    columns, rows = prediction_table(predictions)
    rows = [writable(row) for row in rows]
    WRITERS[".parquet"](tmp_path / "p.parquet", columns, rows)
    read = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert read == rows and len(rows) == 20
    assert [one["scores.tuned.exact_match"] for one in read] == [float(one["right"]) for one in predictions]
    assert [one["fields.group.tuned"] for one in read] == [one["fields"]["group"]["tuned"] for one in predictions]
    assert ("scores.base.loss" in columns) is base and read[1]["images"] == ["<s>1.jpg", r"h\udcfct.jpg"]
