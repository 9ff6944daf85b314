"""Figures as text."""

import pytest

from phi3v.evaluation.figures import (
    counted,
    duration,
    ending,
    interval,
    p_said,
    p_value,
    percent,
    short_number,
    unbroken,
)
from phi3v.evaluation.shares import wilson_interval


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.9345, "93.5 %"),
        (0.5, "50.0 %"),
        (0.0004, "< 0.1 %"),
        (0.0006, "0.1 %"),
        (0.99973, "> 99.9 %"),
        (0.9999994, "> 99.9 %"),
        (0.9994, "99.9 %"),
        (sum([0.1] * 10), "100 %"),
        (-1e-17, "0 %"),
        (wilson_interval(20, 20)[1], "100 %"),
        (wilson_interval(0, 7)[0], "0 %"),
    ],
)
def test_percent(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1234567, "1,234,567"), (0.012345, "0.0123"), (5.0, "5"), (12.34, "12.3")]
)
def test_short_number(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(4.23, "4.2 s"), (75, "1 min 15 s"), (7325, "2 h 2 min"), (0, "0.0 s")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_p_value_below_the_limit_is_not_shown_as_the_limit():
    shown = [p_value(p) for p in (6e-58, 0.0216, 0.0494, 0.0499, 0.05, 0.0501, 0.5, None)]
    assert shown == ["< 0.001", "0.022", "0.049", "< 0.05", "0.05", "0.05", "0.5", "–"]
    assert (p_said(0.0499), p_said(0.05)) == ("< 0.05", "= 0.05")


@pytest.mark.parametrize(("number", "text"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps")])
def test_counted(number, text):
    assert counted(number, "step") == text


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        (None, ""),
        ({"step": 9}, ""),
        (
            {"step": 9, "metric": "eval_loss", "score": 0.41, "last_score": 0.41},
            "the weights kept are of step 9, the last, held-out loss 0.41",
        ),
        (
            {"step": 2, "metric": "eval_similarity", "score": 0.5, "last_score": 0.25},
            "the weights kept are of step 2, eval_similarity 0.5 (0.25 at the last validation)",
        ),
        (
            {"step": 9, "metric": "eval_loss", "score": None, "last_score": None, "patience": 1},
            "ended early at step 9 of 12: held-out loss did not get better for 1 validation; the weights kept are of "
            "step 9, the last: no validation had a held-out loss to choose by",
        ),
    ],
)
def test_ending(kept, text):
    assert ending({"steps": 9, "planned": 12, "kept": kept}) == text


def test_a_figure_is_not_broken_between_lines():
    line = "fell from 95.5 % (90.1 % to > 99.9 %) to 5.4 %, p < 0.001, p = 0.02, p 0.3, at 100 rows"
    whole = "fell from 95.5_% (90.1_% to >_99.9_%) to 5.4_%, p_<_0.001, p_=_0.02, p_0.3, at 100 rows"
    assert unbroken(line) == whole.replace("_", "\u00a0")


def test_interval():
    assert interval({"low": 0.5958, "high": 1.0}) == "59.6 % to 100 %"
    assert interval({"low": 0.0002, "high": 0.9999}) == "< 0.1 % to > 99.9 %"
