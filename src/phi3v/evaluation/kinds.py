"""What kind of answer rows expect, and which metrics such answers are scored with. Strings in, names out.

The kind follows from the expected answers alone, never from what a model says, so that base and tuned, and runs on the
same rows, are scored alike. The first rule that at least 95 % of the expected answers keep decides:

    json             a JSON object or list
    templated        the form of the answer template, where it has words of its own beside its fields
    multiple_choice  one letter out of at most eight, "B" or "(B)"; or an option that the question lists, by its text
    number           a number, codes with leading zeros aside
    short            at most 8 words and 60 characters on one line
    text             anything else
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phi3v.errors import ConfigError, install
from phi3v.evaluation.choices import listed_options, named_option
from phi3v.evaluation.fields import MOST, AnswerTemplate, choose_numeric_fields, looks_numeric, no_numbers
from phi3v.evaluation.json_answers import json_leaves
from phi3v.evaluation.text_scores import PACKAGES, missing_package, require_package

MOST_LETTERS = 8
MOST_WORDS, MOST_CHARACTERS = 8, 60

CHOSEN = {
    "json": ("json_field_accuracy", "json_valid"),
    "templated": ("exact_match", "field_accuracy"),
    "multiple_choice": ("multiple_choice",),
    "number": ("relaxed_accuracy",),
    "short": ("anls",),
    "text": ("rouge_l", "chrf"),
}
"""Kind -> its metrics, the one that stands for the whole first."""

ALWAYS = ("exact_match", "similarity")
"""What every evaluation has, whatever the kind."""

METRICS = tuple(dict.fromkeys([*ALWAYS, *(name for names in CHOSEN.values() for name in names)]))
"""Every metric that a recipe or the command line may name."""


@dataclass(frozen=True)
class Scoring:
    """How answers to some rows are scored.

    Attributes:
        kind: what the expected answers are.
        why: a line that says what it was taken from.
        metrics: names, the one that stands for the whole first.
        template: the answer template.
        numeric: its fields that are compared as numbers.
        notes: lines about what was left out.
    """

    kind: str
    why: str
    metrics: tuple[str, ...]
    template: AnswerTemplate
    numeric: frozenset[str]
    notes: tuple[str, ...] = ()


def choose_scoring(
    expected: Sequence[str],
    questions: Sequence[str],
    template: AnswerTemplate,
    *,
    metrics: Iterable[str] | None = None,
    numeric_fields: Iterable[str] | None = None,
) -> Scoring:
    """Chooses the metrics for rows by the kind of their answers.

    Args:
        expected: what should be answered.
        questions: what is asked, in the same order.
        template: the answer template of the recipe.
        metrics: names that replace those chosen by the kind; `ALWAYS` come after them all the same.
        numeric_fields: fields of the template compared as numbers; None finds them by their values.

    Raises:
        ConfigError: a name that is no metric, or `field_accuracy` without a template that has fields.
        MissingPackageError: a named metric's package is not installed; one that was chosen is left out with a note.
    """
    kind, why = answer_kind(expected, questions, template)
    notes: list[str] = []
    if metrics is None:
        names = [name for name in CHOSEN[kind] if missing_package(name) is None]
        notes = [
            f"{name} is left out: {PACKAGES[name].replace('_', '-')} is not installed, {install('metrics')}"
            for name in CHOSEN[kind]
            if name not in names
        ]
    else:
        names = list(metrics)
        check_metrics(names, template)
    numeric = choose_numeric_fields(expected, template, numeric_fields) if template.separable else frozenset()
    if "field_accuracy" in names:
        notes += [
            f"{field}: {count} of {rows} expected values are no numbers; they are compared as texts and have no part "
            "in the mean absolute error"
            for field, (count, rows) in no_numbers(expected, template, numeric).items()
        ]
    if kind == "short" and (unit := _unit(expected)) is not None:
        notes.append(
            f"expected answers are numbers with {unit!r} behind them, compared as texts; with the number in a column "
            f"of its own and data.answer '{{number}} {unit}' they are compared as numbers"
        )
    return Scoring(kind, why, tuple(dict.fromkeys([*names, *ALWAYS])), template, numeric, tuple(notes))


def check_metrics(names: Iterable[str], template: AnswerTemplate) -> None:
    """Refuses metrics that cannot be computed; see `choose_scoring` for what it raises."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"{name!r} is no metric; there are {', '.join(METRICS)}")
        if name == "field_accuracy" and not template.separable:
            raise ConfigError(
                "the metric field_accuracy needs an answer template whose fields can be told apart, and data.answer "
                f"is {template.template!r}: name exact_match or json_field_accuracy"
            )
        require_package(name)


def answer_kind(expected: Sequence[str], questions: Sequence[str], template: AnswerTemplate) -> tuple[str, str]:
    """The kind of answers and a line that says why, see the head of this file.

    Example: ["B", "A", "B"] -> ("multiple_choice", "3 of 3 expected answers name an option"); ["12", "$1,290"] ->
    ("number", "2 of 2 expected answers are a number"); [] -> ("text", "there are no rows").
    """
    if not expected:
        return "text", "there are no rows"
    rules = (
        ("json", "are a JSON object or list", [_is_json(text) for text in expected]),
        (
            "templated",
            "have the form of the answer template",
            [template.worded and template.parse(text) is not None for text in expected],
        ),
        ("multiple_choice", "name an option", _choices(expected, questions)),
        ("number", "are a number", [looks_numeric([text]) for text in expected]),
        ("short", f"have at most {MOST_WORDS} words", [_is_short(text) for text in expected]),
    )
    for kind, words, fits in rules:
        if sum(fits) >= MOST * len(expected):
            return kind, f"{sum(fits)} of {len(expected)} expected answers {words}"
    return "text", f"the {len(expected)} expected answers have no form of their own"


def _is_json(text: str) -> bool:
    return text.strip()[:1] in ("{", "[") and json_leaves(text) is not None


def _choices(expected: Sequence[str], questions: Sequence[str]) -> list[bool]:
    """Which answers are one letter out of few, or name an option of their question."""
    letters = [re.fullmatch(r"\(?([A-Z])\)?[.:]?", text.strip()) for text in expected]
    few = len({match[1] for match in letters if match}) <= MOST_LETTERS
    options = [listed_options(question) for question in questions]
    return [
        (match is not None and few) or (bool(listed) and named_option(text, listed) is not None)
        for text, match, listed in zip(expected, letters, options, strict=True)
    ]


def _unit(expected: Sequence[str]) -> str | None:
    """The word behind the number of most answers: ["12 kg", "7 kg"] -> "kg", ["12 kg", "a cat"] -> None."""
    pairs = [text.strip().rsplit(maxsplit=1) for text in expected]
    units = Counter(pair[1] for pair in pairs if len(pair) == 2 and looks_numeric(pair[:1]))
    unit, count = next(iter(units.most_common(1)), ("", 0))
    worded = any(map(str.isalpha, unit)) and not {*unit} & {*"{}"}  # "1 290" is none, and braces are the template's
    return unit if worded and count >= MOST * len(expected) else None


def _is_short(text: str) -> bool:
    text = text.strip()
    return len(text.split()) <= MOST_WORDS and len(text) <= MOST_CHARACTERS and "\n" not in text
