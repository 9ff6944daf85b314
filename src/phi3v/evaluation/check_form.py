"""Do answers look as they should: their form, their end, their length, their script? Texts in, a `Check` out.

Costs nothing: the answers are there. Shares of what stands beside the target are given too where there are some, so
that drift can be told from what was always so.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from statistics import median
from typing import Any

from phi3v.evaluation.answers import Answers
from phi3v.evaluation.choices import listed_options, named_option
from phi3v.evaluation.compared import Check
from phi3v.evaluation.fields import looks_numeric
from phi3v.evaluation.figures import percent
from phi3v.evaluation.json_answers import json_valid
from phi3v.evaluation.kinds import Scoring

FEW, MANY = 0.02, 0.2
"""Shares of answers from which on the check warns, and fails."""
LONGER = 2.0
"""Times longer, or shorter, than expected: the median answer."""
_CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<unk>|<pad>|<0x[0-9A-F]{2}>|\[/?INST\]|\N{REPLACEMENT CHARACTER}")


def check_form(
    scoring: Scoring,
    expected: Sequence[str],
    questions: Sequence[str],
    tuned: Answers,
    base: Answers | None = None,
) -> Check:
    """Looks at the form of answers.

    Args:
        scoring: the kind of the expected answers, and their template.
        expected: what should be answered.
        questions: what was asked.
        tuned: the answers.
        base: those of what stands beside; they do not decide.
    Example: 200 answers, 10 of them cut off at the longest answer that is allowed -> warn, "5.0 % are cut off at
        evaluation.max_new_tokens".
    """
    if not expected:
        return Check("skipped", "there are no answers")
    own = _shares(scoring, expected, questions, tuned)
    theirs = _shares(scoring, expected, questions, base) if base is not None else None
    figures = {"rows": len(expected), "kind": scoring.kind, "tuned": own, "base": theirs}
    wrong = {name: own[name] for name in _WORDS if own[name] is not None and own[name] >= FEW}
    said = [f"{percent(share)} {_WORDS[name]}" for name, share in wrong.items()]
    ratio = own["length"]
    if ratio is not None and not 1 / LONGER <= ratio <= LONGER:
        said.append(f"the median answer is {ratio:.2g} times as long as expected")
    if not said:
        formed = "" if own["formless"] is None else f", {percent(1 - own['formless'])} in the form that is expected"
        return Check("pass", f"{len(expected)} answers{formed}, as long as expected", figures)
    worst = max(wrong.values(), default=0.0)
    return Check("fail" if worst >= MANY else "warn", f"of {len(expected)} answers {'; '.join(said)}", figures)


_WORDS = {
    "formless": "are not in the form that is expected",
    "cut_off": "are cut off at evaluation.max_new_tokens",
    "empty": "are empty",
    "other_script": "have letters of a script that no expected answer has",
    "control": "have control tokens or broken characters in them",
}
"""Shares that should be 0 -> what is said of them."""


def _shares(scoring: Scoring, expected: Sequence[str], questions: Sequence[str], answers: Answers) -> dict[str, Any]:
    """Shares of one set of answers; None where a share says nothing."""
    rows = list(zip(expected, questions, answers.texts, strict=True))
    known = set().union(*(scripts(text) for text in expected))
    ends = [ended for ended in answers.ended if ended is not None]
    formed = [_has_form(scoring, *row) for row in rows]
    usual, own = median(map(len, expected)), median(map(len, answers.texts))
    return {
        "formless": None if None in formed else _share([not one for one in formed]),
        "cut_off": _share([not ended for ended in ends]) if ends else None,
        "empty": _share([not text.strip() for text in answers.texts]),
        "other_script": _share([bool(scripts(text) - known) for text in answers.texts]),
        "control": _share([_has_leftovers(wanted, text) for wanted, _, text in rows]),
        "length": own / usual if usual else None,
    }


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
    """The scripts of a text's letters by their Unicode names: "Schal шарф 12" -> {"LATIN", "CYRILLIC"}."""
    letters = {letter for letter in text if letter.isalpha()}
    return {unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0] for letter in letters}


def _share(flags: Sequence[bool]) -> float:
    """[True, False, False, False] -> 0.25."""
    return sum(flags) / len(flags)
