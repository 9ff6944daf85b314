"""What a comparison found, said in words: a figure of evaluation.json in, sentences out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3v.evaluation.figures import counted, gain, gain_ends, p_said, p_value, shortened
from phi3v.evaluation.figures import figure as value_said
from phi3v.evaluation.paired import LEAST_ROWS

CHANCE = 0.05
"""The p value from which on a difference is called chance."""
ODDS = "disagree, and the p value decides"
"""What is said of an interval and a test that say opposite things, see `at_odds`."""
MOST_TEXTS = 0.5
"""Of the rows: so many texts that are in training too are most of them."""


def which_rows(evaluation: Mapping[str, Any]) -> str:
    """What the rows of the headline may be called: "rows that training never saw" where the check `overlap` passed,
    looked at all of training, and most texts are not in training, else "held-out rows": copies that were cropped or
    mirrored are not found, and their texts tell of them."""
    found = (evaluation.get("checks") or {}).get("overlap") or {}
    whole = found.get("verdict") == "pass" and not found.get("not_looked_at")
    known = found.get("same_texts", 0) >= MOST_TEXTS * found.get("rows", 1)
    return "rows that training never saw" if whole and not known else "held-out rows"


FAILED = {
    "overlap": "Not new to the model",
    "form": "Answers are not in form",
    "constant": "No better than one answer to everything",
    "images": "Nothing shows that the images matter",
    "forgetting": "Forgotten",
}
"""What is said of a check that failed, in front of its line."""


def cautions(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stands beside the headline, as words and a check's line: each check that failed, an overlap that only warns,
    and a loss that kept rows are too few to show.

    Example: [("Forgotten", "ANLS 5.4 % on 24 kept rows, 97.9 % before the tuning (...)")].
    """
    found = evaluation.get("checks") or {}
    if beside_constant(evaluation):  # the large line, or the one beneath it, says so
        found = {name: one for name, one in found.items() if name != "constant"}
    told, overlap = failures(found), found.get("overlap", {})
    if overlap.get("verdict") == "warn":
        words = FAILED["overlap"] if overlap.get("seen_images", 1) else "Perhaps not new to the model"
        told.insert(0, (words, overlap["line"]))
    kept = found.get("forgetting", {})
    if kept.get("verdict") != "fail" and "rows_needed" in kept:
        told.append(("Perhaps forgotten", kept["line"]))
    return told


def failures(checks: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The checks that failed, as words and line: [("Forgotten", "ANLS 5.4 % on 24 kept rows, ...")]."""
    failed = [(name, one) for name, one in checks.items() if one["verdict"] == "fail"]
    return [(FAILED.get(name, f"Check {name} failed"), one["line"]) for name, one in failed]


def beside_constant(evaluation: Mapping[str, Any]) -> str:
    """Says so where the primary figure is no better than one answer to every row, else "".

    Example: 65.9 % beside 65.7 %, p 0.9 -> "Not clearly better than always answering “Product: Scarf”"; as much or less
    -> "No better than always answering ...". Fewer than 6 rows can tell nothing, nor can an older evaluation.json.
    """
    primary = evaluation["metrics"][evaluation["primary"]]
    found = primary.get("over_constant")
    images = evaluation.get("images") or {}
    different = min(evaluation["rows"], images.get("different") or LEAST_ROWS)
    if found is None or found["p"] is None or different < LEAST_ROWS:
        return ""
    gap = found["difference"]["value"] * (1 if primary["better"] == "higher" else -1)
    if gap > 0 and found["p"] < CHANCE:
        return ""
    answer = (evaluation.get("constant") or evaluation.get("majority") or {}).get("answer")
    named = "one answer to every row" if answer is None else f"always answering “{shortened(answer)}”"
    return f"{'No' if gap <= 0 else 'Not clearly'} better than {named}"


def single_answer(evaluation: Mapping[str, Any]) -> str:
    """The control by name: "Always answering “Scarf”, the best single answer,"; of an evaluation from before it was
    looked for, the most frequent answer."""
    single = evaluation.get("constant")
    if single is None:
        return "Giving the most frequent answer to every row"
    most = " and the most frequent one" if single["origin"] == "most frequent" else ""
    return f"Always answering “{shortened(single['answer'])}”, the best single answer{most},"


def better_fields(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Fields that are clearly better than one answer to everything, with the figures of both; for when the primary
    figure is not: one wrong field makes a whole answer wrong.

    The limit of p is shared among the fields (Bonferroni): of twenty fields of a model that knows nothing one would be
    below 0.05.

    Example: ["field “price” (90.0 % beside 10.0 %)"].
    """
    its = [one for one in metrics.values() if one["field"] is not None and one["unit"] == "share"]
    found = []
    for one in its:
        above = one.get("over_constant")
        if above and above["p"] is not None and above["p"] < CHANCE / len(its) and above["difference"]["value"] > 0:
            found.append(f"{row_label(one)} ({_beside(one['tuned']['value'], one['constant'], one['unit'], 'beside')})")
    return found


def _beside(one: float, other: float, unit: str, word: str) -> str:
    """Two values that are not broken between lines: "90.0 % beside 10.0 %"."""
    one_said, other_said = (value_said(value, unit).replace(" ", "\u00a0") for value in (one, other))
    return f"{one_said} {word} {other_said}"


def conclusion(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The large line of the page, and how it looks: {"text": "Better after tuning", "look": "right"}.

    "Better" is only said where the model is better than one answer to every row as well, and not in green where a check
    failed: "Better after tuning, but a check failed". Both texts are "" where there is nothing to say.
    """
    primary = evaluation["metrics"][evaluation["primary"]]
    dull = beside_constant(evaluation)
    if not primary["base"]:
        return {"text": dull, "look": "wrong" if dull else ""}
    found, tuning = verdict(primary), evaluation["against"] == "base"
    if found == "better" and dull:
        return {"text": dull, "look": "" if better_fields(evaluation["metrics"]) else "wrong"}
    if found == "no clear difference":
        beside = "between before and after" if tuning else f"to {column_names(evaluation)['base']}"
        text = f"No clear difference {beside}"
    else:
        text = f"{found.capitalize()} {'after tuning' if tuning else 'than ' + column_names(evaluation)['base']}"
    failed = sum(one["verdict"] == "fail" for one in (evaluation.get("checks") or {}).values())
    if failed and found == "better":
        return {"text": f"{text}, but {'a check' if failed == 1 else f'{failed} checks'} failed", "look": ""}
    return {"text": text, "look": {"better": "right", "worse": "wrong"}.get(found, "")}


def not_looked_at(evaluation: Mapping[str, Any]) -> str:
    """Says so where nothing looked whether answers depend on the images, "" where something did or there are none."""
    pictured = (evaluation.get("images") or {}).get("different", 0)
    if "images" in (evaluation.get("checks") or {}) or not pictured:
        return ""
    return (
        "Whether the answers depend on the images was not looked at. A model that ignores them, or was tuned on "
        "answers that belong to other images, is looked for by the check images, which asks up to 100 rows once more "
        "with grey images: it is made where evaluation.checks is null or names it, and by phi3v evaluate --checks"
    )


def also_changed(evaluation: Mapping[str, Any]) -> dict[str, list[str]]:
    """What else than the primary figure changed clearly (p < 0.05), "better" and "worse".

    "Better" is only what is clearly better than its control too, where it has one: a model that learnt which answers
    are frequent is far better than its base by partial credit.

    Example: {"better": ["field “price” (0 % to 86.7 %)", "loss per trained token (8.84 to 0.978)"], "worse": []}.
    """
    found: dict[str, list[str]] = {"better": [], "worse": []}
    for name, one in evaluation["metrics"].items():
        if name != evaluation["primary"] and one["base"] and (way := verdict(one)) in found:
            above = one.get("over_constant")
            if way == "better" and above and verdict({**above, "better": one["better"]}) != "better":
                continue
            said = _beside(one["base"]["value"], one["tuned"]["value"], one["unit"], "to")
            found[way].append(f"{row_label(one)} ({said}{_in_other_form(evaluation, one)})")
    return found


def out_of_form(evaluation: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, int]:
    """Beneath a field's accuracy: how many answers hold the right value and not the template's form, by side.

    Example: {"base": 200, "tuned": 0}; {} for other figures and where there are none.
    """
    if one["metric"] != "field_accuracy" or one["field"] is None:
        return {}
    sides = {side: scores for side, scores in evaluation["scores"].items() if scores is not None}
    counts = {side: (scores["fields"].get(one["field"]) or {}).get("out_of_form") for side, scores in sides.items()}
    return {side: count or 0 for side, count in counts.items()} if any(counts.values()) else {}


def _in_other_form(evaluation: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    """Says so where a field of the base had the right value in answers without the template's form: "; the base said it
    in 200 answers out of form", else ""."""
    count = out_of_form(evaluation, one).get("base", 0)
    if not count:
        return ""
    return f"; {column_names(evaluation)['base']} said it in {counted(count, 'answer')} out of form"


def row_label(figure: Mapping[str, Any]) -> str:
    """What a figure is called where people read it: "exact match", "field “price”", "“price”, mean absolute error"."""
    if figure["field"] is None:
        return str(figure["label"])
    error = figure["metric"] == "absolute_error"
    return f"“{figure['field']}”, mean absolute error" if error else f"field “{figure['field']}”"


def verdict(figure: Mapping[str, Any]) -> str:
    """ "better", "worse" or "no clear difference": which of them the paired test stands for.

    Example: difference 0.9, p 0.0001 -> "better"; difference 0.9, p 0.2 -> "no clear difference".
    """
    if figure["difference"] is None or figure["difference"]["value"] is None or figure["p"] is None:
        return "no clear difference"
    rise = figure["difference"]["value"] * (1 if figure["better"] == "higher" else -1)
    return "no clear difference" if figure["p"] >= CHANCE or not rise else "better" if rise > 0 else "worse"


def beside_control(figure: Mapping[str, Any]) -> str:
    """What stands beneath a figure's control: whether the paired test shows the figure to be better; "" without one.

    Example: 0.9 beside 0.1 with p 1e-9 -> "model better, p < 0.001"; an error of 131 beside 502 with p 0.2 ->
    "model not clearly better, p 0.2"; an error of 600 beside 502 with p 0.01 -> "model worse, p 0.01". Where the
    figure's own interval, which stands beside it, holds the control and p is below 0.05, the difference stands there
    too: "model better, p < 0.001 (difference -371, -700 to -90)"; and where that interval and the test disagree:
    "model better, p 0.016 (difference +26.0 points, -11.3 to +59.9; the two disagree, and the p value decides)".
    """
    above = figure.get("over_constant")
    if not above or above["p"] is None:
        return ""
    found, own, gap = verdict({**above, "better": figure["better"]}), figure["tuned"], above["difference"]
    said = f"model {'not clearly better' if found == 'no clear difference' else found}, p {p_value(above['p'])}"
    over = own["low"] is not None and own["low"] <= figure["constant"] <= own["high"]
    if not (at_odds(above) or (over and above["p"] < CHANCE)):
        return said
    unit, points = figure["unit"], " points" if figure["unit"] == "share" else ""
    return f"{said} (difference {gain(gap['value'], unit)}{points}, {gain_ends(gap, unit)}{odds(above)})"


def at_odds(figure: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference and its test say opposite things: one that holds 0 and p below 0.05, or one
    that does not and p above.

    Example: -3.2 to 18.8 with p 0.031 -> True; 0.2 to 18.8 with p 0.031 -> False; no interval -> False.
    """
    gap, p = figure["difference"], figure["p"]
    if gap is None or gap["low"] is None or p is None:
        return False
    return bool(gap["low"] <= 0 <= gap["high"]) == (p < CHANCE)


def odds(figure: Mapping[str, Any]) -> str:
    """What stands behind an interval and its p value that disagree: "; the two disagree, and the p value decides", else
    ""."""
    return f"; the two {ODDS}" if at_odds(figure) else ""


def in_words(figure: Mapping[str, Any]) -> str:
    """A difference with its interval, its test and its rows as sentences.

    Example: "+95.5 points (95 % interval +91.2 to +97.6): 191 rows better, 0 worse, 9 the same. If neither were better,
    a difference as large as this would come up less than once in 1,000 times (McNemar's test, p < 0.001)."
    """
    points = " points" if figure["unit"] == "share" else ""
    rows = f"{counted(figure['won'], 'row')} better, {figure['lost']} worse, {figure['tied']} the same"
    if figure["p"] is None:
        return f"No row has this score on both sides: {rows}."
    name = "McNemar's test" if figure["test"] == "mcnemar" else "sign-flip test"
    doubt = f" Here the two {ODDS}." if at_odds(figure) else ""
    p = f"p {p_said(figure['p'])}".replace(" ", "\u00a0")  # not broken between two lines
    return (
        f"{gain(figure['difference']['value'], figure['unit'])}{points} (95 % interval "
        f"{gain_ends(figure['difference'], figure['unit'])}): {rows}. If neither were better, a difference as large as "
        f"this would come up {how_often(figure['p'])} ({name}, {p}).{doubt}"
    )


def how_often(p: float) -> str:
    """A p value as a count: 1e-9 -> "less than once in 1,000 times", 0.0042 -> "about 4 times in 1,000", 0.3 -> "about
    30 times in 100", 1.0 -> "every time"."""
    if p < 0.001:
        return "less than once in 1,000 times"
    if p >= 0.995:
        return "every time"
    many, of = (round(100 * p), "100") if p >= 0.0095 else (round(1000 * p), "1,000")
    return f"about {'once' if many == 1 else f'{many} times'} in {of}"


def column_names(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What the columns of both sets of answers are called: {"base": "base", "tuned": "tuned"}, or the targets' names.

    Example: runs/a beside runs/b -> {"base": "b", "tuned": "a"}; runs/a alone -> {"tuned": "a"}; a/x beside b/x ->
    {"base": "b/x", "tuned": "a/x"}.
    """
    target, base = evaluation["target"], evaluation["base"]
    short = {name: Path(name).name or name for name in (target, base) if name is not None}
    if evaluation["against"] == "base":
        return {"base": "base", "tuned": "tuned"}
    if base is None:
        return {"tuned": short[target]}
    return (
        {"base": base, "tuned": target}
        if short[base] == short[target]
        else {"base": short[base], "tuned": short[target]}
    )
