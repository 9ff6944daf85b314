"""Figures as people read them: shares, intervals, large and small numbers, counts, times. Numbers in, texts out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

EXACT = 1e-9
"""A share this near to nothing or all is that: sums of floats and Wilson's formula miss it by less."""


def percent(value: float) -> str:
    """A share in per cent with one decimal where it says something: 0.9345 -> "93.5 %", 1.0 -> "100 %", 0.0 -> "0 %".

    "100 %" and "0 %" are all and nothing: 0.9997 -> "> 99.9 %", 0.0004 -> "< 0.1 %".
    """
    text = f"{100 * value:.1f}"
    if text in ("0.0", "-0.0"):
        return "0 %" if value <= EXACT else "< 0.1 %"
    if text == "100.0":
        return "100 %" if value >= 1 - EXACT else "> 99.9 %"
    return f"{text} %"


def interval(share: Mapping[str, Any]) -> str:
    """The interval of a share: {"low": 0.596, "high": 0.982} -> "59.6 % to 98.2 %"."""
    return f"{percent(share['low'])} to {percent(share['high'])}"


def figure(value: float | None, unit: str) -> str:
    """A value of a metric: 0.955, "share" -> "95.5 %"; 12.0, "number" -> "12"; None -> "–"."""
    return "–" if value is None else percent(value) if unit == "share" else short_number(value)


def ends(estimate: Mapping[str, Any], unit: str) -> str:
    """The interval of an estimate: {"low": 0.917, "high": 0.976}, "share" -> "91.7 % to 97.6 %"; "–" without one."""
    if estimate["low"] is None:
        return "–"
    return f"{figure(estimate['low'], unit)} to {figure(estimate['high'], unit)}"


def gain(value: float | None, unit: str) -> str:
    """A difference with its sign, of shares in points of a hundred: 0.955, "share" -> "+95.5"; -12.0 -> "-12"."""
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}" if unit == "share" else f"{'+' if value > 0 else ''}{short_number(value)}"
    return "0" if text in ("+0.0", "-0.0") else text


def gain_ends(estimate: Mapping[str, Any], unit: str) -> str:
    """The interval of a difference: {"low": -0.01, "high": 0.02}, "share" -> "-1.0 to +2.0"; "–" without one."""
    return "–" if estimate["low"] is None else f"{gain(estimate['low'], unit)} to {gain(estimate['high'], unit)}"


def p_value(p: float | None) -> str:
    """A p value: 6e-58 -> "< 0.001", 0.0216 -> "0.022", 0.5 -> "0.5", None -> "–".

    "0.05" is not below the limit that decides: 0.0499 -> "< 0.05".
    """
    if p is None:
        return "–"
    text = "< 0.001" if p < 0.001 else f"{p:.2g}"
    return "< 0.05" if text == "0.05" and p < 0.05 else text


def p_said(p: float | None) -> str:
    """A p value behind the letter: 6e-58 -> "< 0.001", 0.5 -> "= 0.5"."""
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def unbroken(text: str) -> str:
    """A line whose figures stay whole where a page breaks it: no break within "95.5 %", "> 99.9 %" and "p < 0.001"."""
    return re.sub(r"(?<=\d) (?=%)|(?<=[<>=]) (?=\d)|(?<=\bp) (?=[<=\d])", "\u00a0", text)


def shortened(text: str, most: int = 60) -> str:
    """A text on one line, its end left out where it is long: "a\nb" -> "a b", 100 letters -> 59 and "…"."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def short_number(value: float | None) -> str:
    """A figure in three or four digits: None -> "–", 1234567 -> "1,234,567", 0.012345 -> "0.0123", 5.0 -> "5"."""
    if value is None:
        return "–"
    if abs(value) >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}"


def counted(number: int, thing: str) -> str:
    """A number of things: 3, "step" -> "3 steps"; 1, "held-out row" -> "1 held-out row"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def score_name(metric: str) -> str:
    """What the score of a validation is called: "eval_loss" -> "held-out loss", others as recipes name them."""
    return "held-out loss" if metric == "eval_loss" else metric


def ending(summary: Mapping[str, Any]) -> str:
    """How a run ended whose best weights are kept, by its finished.json; "" of one that does not choose.

    Example: "ended early at step 10 of 30: held-out loss did not get better for 4 validations; the weights kept are of
    step 2, held-out loss 0.41 (0.5 at the last validation)".
    """
    kept, steps = summary.get("kept") or {}, summary.get("steps")
    if "metric" not in kept:
        return ""
    name, score, last = score_name(kept["metric"]), kept["score"], kept["last_score"]
    article = "a" if kept["metric"] == "eval_loss" else "an"
    of = f"the weights kept are of step {kept['step']}{', the last' if kept['step'] == steps else ''}"
    said = (
        f"{of}, {name} {score:.4g}" if score is not None else f"{of}: no validation had {article} {name} to choose by"
    )
    if kept["step"] != steps and score is not None and last is not None:
        said += f" ({last:.4g} at the last validation)"
    if "patience" not in kept:
        return said
    without = f"{name} did not get better for {counted(kept['patience'], 'validation')}"
    return f"ended early at step {steps} of {summary['planned']}: {without}; {said}"


def rows_about(found: Mapping[str, Any], thing: str, things: str | None = None) -> str:
    """The rows of an evaluation, and their photos where several rows are about one.

    Example: {"rows": 200, "images": {"rows": 200, "different": 20}}, "row" -> "200 rows about 20 photos"; 180 of them
    with photos -> "200 rows, 180 of them about 20 photos"; as many photos as rows -> "200 rows".
    """
    rows, images = found["rows"], found.get("images")
    said = counted(rows, thing) if things is None or rows == 1 else f"{rows} {things}"
    if not images or images["rows"] == images["different"]:
        return said
    some = "" if images["rows"] >= rows else f", {images['rows']} of them"
    return f"{said}{some} about {counted(images['different'], 'photo')}"


def duration(seconds: float) -> str:
    """A time as a person says it: 4.23 -> "4.2 s", 75 -> "1 min 15 s", 7325 -> "2 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
