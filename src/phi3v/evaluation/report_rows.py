"""The rows as a page lists them: words that differ, what can be filtered by, which are worst and best.

Lines of predictions.jsonl in, plain values out. Photos are not opened here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3v.evaluation.categories import choose_categories
from phi3v.evaluation.figures import figure
from phi3v.evaluation.headline import column_names
from phi3v.evaluation.word_marks import Piece, mark_words


@dataclass(frozen=True)
class Said:
    """What somebody says to a row: who, the pieces of the text, right or wrong (None for what was expected)."""

    who: str
    pieces: Sequence[Piece]
    right: bool | None = None


@dataclass(frozen=True)
class ReportRow:
    """One row of the list.

    Attributes:
        name: what it is called, "row 3".
        images: names of its images.
        question: what was asked.
        said: what was expected, then the answers.
        tags: what filters look for, "right won f0 c0-1".
        score: its figure of the primary metric, where that says more than right and wrong.
    """

    name: str
    images: Sequence[str]
    question: str
    said: Sequence[Said]
    tags: str
    score: str = ""


@dataclass(frozen=True)
class Filter:
    """A menu over the list: its name and its choices, tag -> words."""

    name: str
    choices: Mapping[str, str]


def list_rows(
    predictions: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]
) -> tuple[list[ReportRow], list[Filter]]:
    """All rows for the list, in their order, and the menus that fit them.

    Tags of a row: `right` or `wrong` (exact match); beside a base `won`, `lost` or `same` by the primary metric; `f0`
    where the first field of the figures is wrong, and not where the row has no such field; `c0-1` where it has the
    second value of the first category.

    Args:
        predictions: the lines of predictions.jsonl.
        evaluation: evaluation.json.
    """
    primary = evaluation["primary"]
    names = side_names(evaluation)
    fields = {
        name: one["field"] for name, one in evaluation["metrics"].items() if one["field"] and one["unit"] == "share"
    }
    categories = choose_categories(predictions)
    values = {name: list(dict.fromkeys(its)) for name, its in categories.items()}
    rows = []
    for position, one in enumerate(predictions):
        tags = ["right" if one["right"] else "wrong", *_beside(one["scores"], primary)]
        scores = one["scores"]["tuned"]
        told = {name: scores[name] for name in fields if scores.get(name) is not None}
        tags += [f"f{at}" for at, name in enumerate(fields) if told.get(name, 1.0) < 1]
        tags += [f"c{at}-{values[name].index(its[position])}" for at, (name, its) in enumerate(categories.items())]
        said = say(one["expected"], {names["base"]: one["base"], names["tuned"]: one["tuned"]})
        rows.append(
            ReportRow(
                f"row {one['row']}",
                one["images"],
                one["question"],
                said,
                " ".join(tags),
                _score(one["scores"], primary),
            )
        )
    menus = [Filter("answers", {"right": "right", "wrong": "wrong"})]
    if evaluation["base"]:
        beside = {"won": "better than before", "lost": "worse than before", "same": "as good as before"}
        if evaluation["against"] != "base":
            beside = {tag: words.replace("before", names["base"]) for tag, words in beside.items()}
        menus.append(Filter("compared", beside))
    if fields:
        menus.append(Filter("field", {f"f{at}": f"{name} wrong" for at, name in enumerate(fields.values())}))
    menus += [Filter(name, {f"c{at}-{k}": v for k, v in enumerate(values[name])}) for at, name in enumerate(values)]
    return rows, menus


def say(expected: str, answers: Mapping[str, str | None]) -> list[Said]:
    """What was expected and what was answered, with the words that differ; of what was expected those are marked that
    the last answer lacks. Answers that are None are left out.

    Example: "a cat", {"base": None, "tuned": "a dog"} -> expected [("a ", False), ("cat", True)], tuned [("a ", False),
    ("dog", True)] and wrong.
    """
    marked = {who: mark_words(expected, text) for who, text in answers.items() if text is not None}
    lacking = list(marked.values())[-1][0]
    return [
        Said("expected", lacking),
        *(Said(who, pieces[1], str(answers[who]).strip() == expected.strip()) for who, pieces in marked.items()),
    ]


def choose_extremes(predictions: Sequence[Mapping[str, Any]], primary: str, count: int) -> tuple[list[int], list[int]]:
    """Positions of the worst and of the best rows, half of `count` each, the worst and the best first.

    Rows are ordered by the primary metric, then by similarity, then by what was gained in similarity over the base; of
    rows that are equal in all the first ones are taken. A row without a slip is not among the worst, one without a
    score not among the best.
    """

    def key(position: int) -> tuple[float, float, float]:
        scores = predictions[position]["scores"]
        tuned, base = scores["tuned"], scores["base"] or {}
        like = tuned.get("similarity") or 0.0
        return tuned.get(primary) or 0.0, like, like - (base.get("similarity") or 0.0)

    keys = [key(position) for position in range(len(predictions))]
    worst = sorted((at for at, one in enumerate(keys) if one[0] < 1), key=lambda at: (keys[at], at))
    worst = worst[: count - count // 2]
    best = sorted(
        (at for at, one in enumerate(keys) if one[0] > 0 and at not in worst),
        key=lambda at: ([-part for part in keys[at]], at),
    )
    return worst, best[: count // 2]


def side_names(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What the two sides are called where people read it: "base" and "tuned", or the names of two targets."""
    if not evaluation["base"]:
        return {"base": "base", "tuned": "this model"}
    if evaluation["against"] == "base":
        return {"base": "before", "tuned": "after"}
    return column_names(evaluation)


def _beside(scores: Mapping[str, Any], primary: str) -> list[str]:
    """["won"], ["lost"] or ["same"] beside a base, [] without one or where a side has no score."""
    tuned, base = scores["tuned"].get(primary), (scores["base"] or {}).get(primary)
    if tuned is None or base is None:
        return []
    return ["won" if tuned > base else "lost" if tuned < base else "same"]


def _score(scores: Mapping[str, Any], primary: str) -> str:
    """ "40 % → 83.3 %", or "" where there are but 0 and 1."""
    found = [side.get(primary) for side in (scores["base"], scores["tuned"]) if side]
    if all(value in (None, 0.0, 1.0) for value in found):
        return ""
    return " → ".join(figure(value, "share") for value in found)
