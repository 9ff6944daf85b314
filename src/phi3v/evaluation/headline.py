"""What a comparison found, said in words: a figure of evaluation.json in, sentences out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3v.evaluation.figures import counted, gain, gain_ends, p_value

CHANCE = 0.05
"""The p value from which on a difference is called chance."""


def which_rows(evaluation: Mapping[str, Any]) -> str:
    """What the rows of the headline may be called: "rows that training never saw" where the check `overlap` passed and
    looked at all of training, else "held-out rows"."""
    found = (evaluation.get("checks") or {}).get("overlap") or {}
    whole = found.get("verdict") == "pass" and not found.get("not_looked_at")
    return "rows that training never saw" if whole else "held-out rows"


def caution(evaluation: Mapping[str, Any]) -> str:
    """The line of an overlap that was found, "" where none was: "2 of 12 rows (16.7 %) are in the training data as
    well; ..."."""
    found = (evaluation.get("checks") or {}).get("overlap") or {}
    return found["line"] if found.get("verdict") in ("warn", "fail") else ""


def verdict(figure: Mapping[str, Any]) -> str:
    """ "better", "worse" or "no clear difference": which of them the paired test stands for.

    Example: difference 0.9, p 0.0001 -> "better"; difference 0.9, p 0.2 -> "no clear difference".
    """
    if figure["difference"] is None or figure["difference"]["value"] is None or figure["p"] is None:
        return "no clear difference"
    rise = figure["difference"]["value"] * (1 if figure["better"] == "higher" else -1)
    return "no clear difference" if figure["p"] >= CHANCE or not rise else "better" if rise > 0 else "worse"


def at_odds(figure: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference and its test say opposite things: one that holds 0 and p below 0.05, or one
    that does not and p above.

    Example: -3.2 to 18.8 with p 0.031 -> True; 0.2 to 18.8 with p 0.031 -> False; no interval -> False.
    """
    gap, p = figure["difference"], figure["p"]
    if gap is None or gap["low"] is None or p is None:
        return False
    return bool(gap["low"] <= 0 <= gap["high"]) == (p < CHANCE)


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
    p = p_value(figure["p"])
    odds = " Here the two disagree, and the test decides." if at_odds(figure) else ""
    p = f"p\u00a0{p if p.startswith('<') else '= ' + p}".replace(" ", "\u00a0")  # not broken between two lines
    return (
        f"{gain(figure['difference']['value'], figure['unit'])}{points} (95 % interval "
        f"{gain_ends(figure['difference'], figure['unit'])}): {rows}. If neither were better, a difference as large as "
        f"this would come up {how_often(figure['p'])} ({name}, {p}).{odds}"
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
