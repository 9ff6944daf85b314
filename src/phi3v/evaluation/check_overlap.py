"""Has training seen what the evaluation asks? Training rows and evaluated rows in, a `Check` out.

Pictures are compared by eye (`data.alike`), texts letter by letter, case and white space aside. A row has leaked when
training has its picture with the same question and answer, or, where it has no picture, its text. The same answer to
another picture is nothing strange: most data has few answers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from phi3v.data.alike import Alike, find_alike, take_prints
from phi3v.data.images import MAX_PIXELS, image_name
from phi3v.data.rows import Rows
from phi3v.data.schema import Row
from phi3v.evaluation.compared import Check, compare, few_rows
from phi3v.evaluation.figures import counted, figure, percent
from phi3v.evaluation.row_scores import Column

MOST_IMAGES = 20_000
"""Training images that are looked at, evenly spaced: minutes on a few cores, 64 MB."""
LEAKED_SHARE = 0.01
"""Of the evaluated rows; from there on the score says little."""
SHOWN = 20
"""Pairs that are named."""


def check_overlap(
    train: Sequence[Row],
    rows: Sequence[Row],
    tuned: Column,
    base: Column | None,
    *,
    max_pixels: int = MAX_PIXELS,
    most_images: int = MOST_IMAGES,
) -> Check:
    """Compares evaluated rows with training rows.

    Args:
        train: all training rows.
        rows: the evaluated ones.
        tuned: the target's scores on them by the metric that stands for the whole.
        base: those of what stands beside it.
        max_pixels: larger images are not opened.
        most_images: training images that are looked at.
    """
    distinct = train.distinct()[0] if isinstance(train, Rows) else list(train)
    known_texts, pictured = set(), []
    for place, row in enumerate(distinct):
        known_texts.add(_text(row))
        if row.images:
            pictured.append(place)
    known_rows = [distinct[place] for place in few_rows(pictured, most_images)]
    threads = min(8, os.cpu_count() or 1)
    asked_rows = list(rows)
    known, asked = (take_prints(some, max_pixels=max_pixels, threads=threads) for some in (known_rows, asked_rows))
    pairs = list(find_alike(known, asked, known_rows, asked_rows))
    same = {pair.asked: pair for pair in pairs if _text(asked_rows[pair.asked]) == _text(known_rows[pair.known])}
    seen = {pair.asked: pair for pair in reversed(pairs)} | same
    told = [place for place, row in enumerate(asked_rows) if _text(row) in known_texts]
    leaked = sorted({*same, *(place for place in told if not asked_rows[place].images)})
    figures = {
        "rows": len(asked_rows),
        "leaked": len(leaked),
        "seen_images": len(seen),
        "same_texts": len(told),
        "train_rows": len(distinct),
        "looked_at": len(known.places),
        "not_looked_at": len(pictured) - len(known_rows),
        "unread": known.unread + asked.unread,
        "pairs": [_named(pair, asked_rows, known_rows, same) for _, pair in sorted(seen.items())[:SHOWN]],
        "without": _without(leaked, tuned, base) if leaked else None,
    }
    return Check(*_verdict(figures, tuned), figures)


def _verdict(figures: Mapping[str, Any], tuned: Column) -> tuple[str, str]:
    """What the figures mean."""
    rows, leaked, seen = figures["rows"], figures["leaked"], figures["seen_images"]
    looked = f"{counted(figures['looked_at'], 'training image')} looked at"
    looked += f", those of {counted(left, 'row')} were not" if (left := figures["not_looked_at"]) else ""
    if leaked:
        verdict = "fail" if leaked >= LEAKED_SHARE * rows else "warn"
        line = f"{leaked} of {counted(rows, 'row')} ({percent(leaked / rows)}) are in the training data as well"
        left = figures["without"]["tuned"]
        if left["rows"]:
            value, unit = figure(left["value"], tuned.unit), tuned.unit
            whole = float(np.nanmean(tuned.values)) if not np.isnan(tuned.values).all() else None
            line += f"; the score of the other {left['rows']} is {value}, of all {figure(whole, unit)}"
        return verdict, line
    if seen:
        line = f"the pictures of {seen} of {counted(rows, 'row')} are in the training data too, with other texts"
        return "warn", f"{line}; {looked}"
    return "pass", f"no row of the evaluation was found in the training data; {looked}"


def _without(leaked: Sequence[int], tuned: Column, base: Column | None) -> dict[str, Any]:
    """The scores of the rows that have not leaked."""
    rest = np.setdiff1d(np.arange(len(tuned.values)), leaked)

    def part(column: Column) -> Column:
        weights = None if column.weights is None else column.weights[rest]
        return Column(column.metric, column.field, column.values[rest], weights)

    found = compare(part(tuned), None if base is None else part(base))
    return {"metric": tuned.name, "tuned": found.pop("one"), "base": found.pop("other"), **found}


def _named(pair: Alike, rows: Sequence[Row], known_rows: Sequence[Row], same: Mapping[int, Alike]) -> dict[str, Any]:
    """A pair as it is written down."""
    mine, other = rows[pair.asked], known_rows[pair.known]
    return {
        "shares": "image and text" if pair.asked in same else "image",
        "row": mine.index,
        "source": mine.source,
        "images": [image_name(image) for image in mine.images],
        "train_row": other.index,
        "train_source": other.source,
        "train_images": [image_name(image) for image in other.images],
        "bits": pair.bits,
    }


def _text(row: Row) -> bytes:
    """A short name of all that is said in a row, by whom, case and white space aside."""
    said = "\0".join(f"{message.role}\0{' '.join(message.text.casefold().split())}" for message in row.messages)
    return blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()
