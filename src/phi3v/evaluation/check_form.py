"""Do answers look as they should: their form, their end, their length, their script? Texts in, a `Check` out.

Costs nothing: the answers are there. Each share has its interval, and those of what stands beside the target are given
too where there are some, so that drift can be told from what was always so.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from phi3v.evaluation.answers import Answers
from phi3v.evaluation.choices import listed_options, named_option
from phi3v.evaluation.compared import Check
from phi3v.evaluation.fields import looks_numeric
from phi3v.evaluation.figures import ends, percent
from phi3v.evaluation.intervals import estimate
from phi3v.evaluation.json_answers import json_valid
from phi3v.evaluation.kinds import Scoring
from phi3v.evaluation.row_scores import Column, Groups

FEW, MANY = 0.02, 0.2
"""Shares of answers from which on the check warns, and fails where the whole interval is above."""
LONGER = 2.0
"""Times longer, or shorter, than expected: the median answer."""
_UNITS = {"μ", "Ω"}  # micro and ohm, as NFKC writes them
_CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<unk>|<pad>|<0x[0-9A-F]{2}>|\[/?INST\]|\N{REPLACEMENT CHARACTER}")


def check_form(
    scoring: Scoring,
    expected: Sequence[str],
    questions: Sequence[str],
    tuned: Answers,
    base: Answers | None = None,
    *,
    groups: Groups | None = None,
) -> Check:
    """Looks at the form of answers.

    Args:
        scoring: the kind of the expected answers, and their template.
        expected: what should be answered.
        questions: what was asked.
        tuned: the answers.
        base: those of what stands beside; they do not decide.
        groups: which rows are about the same images; None where each has its own.
    Example: 200 answers, 10 of them cut off at the longest answer that is allowed -> warn, "5.0 % (2.7 % to 9.0 %) are
        cut off at evaluation.max_new_tokens".
    """
    if not expected:
        return Check("skipped", "there are no answers")
    own = _shares(scoring, expected, questions, tuned, groups)
    theirs = _shares(scoring, expected, questions, base, groups) if base is not None else None
    figures = {"rows": len(expected), "kind": scoring.kind, "tuned": own, "base": theirs}
    wrong = {name: own[name] for name in _WORDS if own[name] is not None and own[name]["value"] >= FEW}
    said = [f"{_told(share)} {_WORDS[name]}{_beside(theirs, name)}" for name, share in wrong.items()]
    ratio = own["length"]
    if ratio is not None and not 1 / LONGER <= ratio <= LONGER:
        there = f" (beside it {theirs['length']:.2g} times)" if theirs and theirs["length"] is not None else ""
        said.append(f"the median answer is {ratio:.2g} times as long as expected{there}")
    if not said:
        formed = ""
        if own["formless"] is not None:
            formed = f", {_told(own['formless'], rest=True)} in the form that is expected"
            formed += _beside(theirs, "formless", rest=True)
        return Check("pass", f"{len(expected)} answers{formed}, as long as expected", figures)
    worst = max((share["low"] for share in wrong.values()), default=0.0)
    return Check("fail" if worst >= MANY else "warn", f"of {len(expected)} answers {'; '.join(said)}", figures)


_WORDS = {
    "formless": "are not in the form that is expected",
    "cut_off": "are cut off at evaluation.max_new_tokens",
    "empty": "are empty",
    "other_script": "have letters of a script that no expected answer has",
    "control": "have control tokens or broken characters in them",
}
"""Shares that should be 0 -> what is said of them."""


def _told(share: Mapping[str, Any], rest: bool = False) -> str:
    """A share with its interval: "85.0 % (70.9 % to 92.9 %)"; with `rest` that of the others: "15.0 % (7.1 % to 29.1
    %)"."""
    if rest:
        share = {"value": 1 - share["value"], "low": 1 - share["high"], "high": 1 - share["low"]}
    return f"{percent(share['value'])} ({ends(share, 'share')})"


def _beside(theirs: Mapping[str, Any] | None, name: str, rest: bool = False) -> str:
    """The same share of what stands beside: " (beside it 0 % (0 % to 8.8 %))", "" without."""
    return "" if theirs is None or theirs[name] is None else f" (beside it {_told(theirs[name], rest)})"


def _shares(
    scoring: Scoring, expected: Sequence[str], questions: Sequence[str], answers: Answers, groups: Groups | None
) -> dict[str, Any]:
    """Shares of one set of answers with their intervals, see `Estimate`; None where a share says nothing."""
    rows = list(zip(expected, questions, answers.texts, strict=True))
    known = set().union(*(scripts(text) for text in expected))
    formed = [_has_form(scoring, *row) for row in rows]
    usual, own = median(map(len, expected)), median(map(len, answers.texts))
    flags: dict[str, list[bool | None]] = {
        "formless": [None if None in formed else not one for one in formed],
        "cut_off": [None if ended is None else not ended for ended in answers.ended] or [None] * len(rows),
        "empty": [not text.strip() for text in answers.texts],
        "other_script": [bool(scripts(text) - known) for text in answers.texts],
        "control": [_has_leftovers(wanted, text) for wanted, _, text in rows],
    }
    columns = [Column("form", name, np.array(one, dtype=np.float64), None, groups) for name, one in flags.items()]
    shares = zip(flags, estimate(columns)[0], strict=True)
    told = {name: None if share.value is None else share.to_dict() for name, share in shares}
    return {**told, "length": own / usual if usual else None}


def _has_form(scoring: Scoring, expected: str, question: str, answer: str) -> bool | None:
    """Whether an answer has the form of its kind; None for kinds without one, True where the expected one lacks it."""
    if scoring.kind == "json":
        return bool(json_valid(expected, answer))
    if scoring.kind == "templated":
        return scoring.template.parse(expected) is None or scoring.template.parse(answer) is not None
    if scoring.kind == "number":
        return looks_numeric([answer]) or not looks_numeric([expected])
    if scoring.kind == "multiple_choice":
        return named_option(answer, listed_options(question)) is not None
    return None


def _has_leftovers(expected: str, answer: str) -> bool:
    """Whether an answer holds what looks like a control token, and the expected one does not."""
    return bool(_CONTROL.search(answer)) and not _CONTROL.search(expected)


def scripts(text: str) -> set[str]:
    """The scripts of a text's letters by their Unicode names: "Schal шарф 12" -> {"LATIN", "CYRILLIC"}.

    Signs count as the letters that they stand for ("Ａ", "º" as A, o), and those of units as none: "5 µm" -> {"LATIN"}.
    """
    letters = {letter for letter in unicodedata.normalize("NFKC", text) if letter.isalpha()} - _UNITS
    return {unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0] for letter in letters} - {"MODIFIER"}
