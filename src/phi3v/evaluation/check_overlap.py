"""Has training seen what the evaluation asks? Training rows and evaluated rows in, a `Check` out.

Pictures are compared by eye (`data.alike`), texts letter by letter, case and white space aside. A row has leaked when a
row of training has all its pictures and no others, with the same question and answer; or, where it has no picture, its
text. The same answer to another picture is nothing strange: most data has few answers. Nor is one of several
pictures: rows may share a reference.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from phi3v.data.alike import Prints, find_alike, take_prints
from phi3v.data.images import MAX_PIXELS, image_name
from phi3v.data.rows import Rows
from phi3v.data.schema import Row
from phi3v.evaluation.compared import Check, compare, few_rows
from phi3v.evaluation.figures import counted, ends, figure, percent
from phi3v.evaluation.headline import MOST_TEXTS
from phi3v.evaluation.paired import LEAST_ROWS
from phi3v.evaluation.row_scores import Column
from phi3v.machine import usable_cores

MOST_IMAGES = 20_000
"""Training images that are looked at, drawn by a fixed seed: minutes on a few cores, 64 MB."""
LEAKED_SHARE = 0.01
"""Of the evaluated rows; from there on the score says little."""
SHOWN = 20
"""Pairs that are named."""
UNFOUND = "cropped, mirrored or brighter copies are not found"
"""What the check does not see, said with what it saw."""


@dataclass(frozen=True)
class _Pair:
    """A row all of whose pictures training has, with a row of training: the one that it leaked from, or another that
    has its first picture.

    Attributes:
        row: place of the row.
        known: place of the row of training.
        bits: that differ in a picture which both have.
        leaked: whether the two are the same.
        same_text: whether one of its pictures is in training with its text.
    """

    row: int
    known: int
    bits: int
    leaked: bool
    same_text: bool


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
    known_texts, pictured = Counter[bytes](), []
    for place, row in enumerate(distinct):
        known_texts[_text(row)] += 1
        if row.images:
            pictured.append(place)
    known_rows = [distinct[place] for place in few_rows(pictured, most_images)]
    threads = min(8, usable_cores())
    asked_rows = list(rows)
    known, asked = (take_prints(some, max_pixels=max_pixels, threads=threads) for some in (known_rows, asked_rows))
    seen = _seen_rows(known, asked, known_rows, asked_rows)
    same, others = ([pair for pair in seen if pair.leaked is leaked] for leaked in (True, False))
    told = [place for place, row in enumerate(asked_rows) if _text(row) in known_texts]
    once = [place for place in told if known_texts[_text(asked_rows[place])] == 1 and asked_rows[place].images]
    found = {pair.row for pair in seen}
    leaked = sorted({*(pair.row for pair in same), *(place for place in told if not asked_rows[place].images)})
    figures = {
        "rows": len(asked_rows),
        "leaked": len(leaked),
        "seen_images": len(seen),
        "seen_not_leaked": len(others),
        "same_texts": len(told),
        "same_rare_texts": len(once),
        "not_found": len(asked_rows) - len(found.union(leaked)),
        "same_rare_texts_not_found": len(set(once) - found),
        "train_rows": len(distinct),
        "looked_at": sum(map(len, known.places)),
        "not_looked_at": len(pictured) - len(known_rows),
        "unread": known.unread + asked.unread,
        "pairs": [_named(pair, asked_rows, known_rows) for pair in seen[:SHOWN]],
        "without": _without(leaked, tuned, base) if leaked else None,
    }
    texts = "other texts or beside other pictures" if any(pair.same_text for pair in others) else "other texts"
    return Check(*_verdict(figures, tuned, texts), figures)


def _seen_rows(known: Prints, asked: Prints, known_rows: Sequence[Row], rows: Sequence[Row]) -> list[_Pair]:
    """The rows all of whose pictures training has, each with one of training's, a leaked one where there is one.

    Example: the row (a, x) has not been seen where training has a, but no x; it has been where training has (a, b) and
    (x); it has leaked where training has (x, a) with its text.
    """
    alike: dict[int, dict[int, int]] = defaultdict(dict)
    for pair in find_alike(known, asked, known_rows, rows):
        alike[pair.asked][pair.known] = pair.bits
    known_pictures, pictures = _pictures_of_rows(known, known_rows), _pictures_of_rows(asked, rows)
    with_text: dict[tuple[bytes, int], set[int]] = defaultdict(set)
    for place, its in known_pictures.items():
        for picture in its:
            with_text[_text(known_rows[place]), picture].add(place)
    found = []
    for place, its in pictures.items():
        if any(picture not in alike for picture in its):
            continue
        text, near = _text(rows[place]), [alike[picture] for picture in sorted(its)]
        told = [set[int]().union(*(with_text.get((text, one), ()) for one in ones)) for ones in near]
        every = set[int]().union(*near)
        same = min((one for one in set.intersection(*told) if known_pictures[one] <= every), default=None)
        shared = next(one for one in near[0] if same is None or one in known_pictures[same])
        other = known.places[shared][0][0] if same is None else same
        found.append(_Pair(place, other, near[0][shared], same is not None, any(told)))
    return found


def _pictures_of_rows(prints: Prints, rows: Sequence[Row]) -> dict[int, set[int]]:
    """The pictures of each row that has some, all of which could be opened: places [[(0, 0), (1, 0)], [(0, 1)]] ->
    {0: {0, 1}, 1: {0}}."""
    found: dict[int, list[int]] = defaultdict(list)
    for picture, places in enumerate(prints.places):
        for place, _ in places:
            found[place].append(picture)
    return {place: set(found[place]) for place in sorted(found) if len(found[place]) == len(rows[place].images)}


def _verdict(figures: Mapping[str, Any], tuned: Column, texts: str) -> tuple[str, str]:
    """What the figures mean."""
    rows, leaked, seen = figures["rows"], figures["leaked"], figures["seen_not_leaked"]
    looked = f"{counted(figures['looked_at'], 'training image')} looked at"
    looked += f", those of {counted(left, 'row')} were not" if (left := figures["not_looked_at"]) else ""
    looked += f" ({UNFOUND})" if figures["looked_at"] else ""
    pictures = f"are in the training data too, with {texts}"
    if leaked:
        line = f"{leaked} of {counted(rows, 'row')} ({percent(leaked / rows)}) are in the training data as well"
        line += _score_of_others(figures["without"]["tuned"], tuned)
        line += f"; the pictures of {seen} of the other {rows - leaked} {pictures}" if seen else ""
        verdict = "fail" if leaked >= LEAKED_SHARE * rows else "warn"
        line += f"; {rare}" if (rare := _rare_texts(figures)) else ""
        return verdict, f"{line}; {looked}" if figures["looked_at"] else line
    if seen:
        line = f"the pictures of {seen} of {counted(rows, 'row')} {pictures}"
        return "warn", f"{line}; {f'{rare}; ' if (rare := _rare_texts(figures)) else ''}{looked}"
    if rare := _rare_texts(figures):
        return "warn", f"no picture of the evaluation was found in the training data; {looked}, but {rare}"
    line = f"no row of the evaluation was found in the training data; {looked}"
    if (told := figures["same_texts"]) >= MOST_TEXTS * rows:
        line += f"; question and answer of {told} of {counted(rows, 'row')} are in training too, beside other pictures"
    return "pass", line


def _score_of_others(left: Mapping[str, Any], tuned: Column) -> str:
    """What the rows get that have not leaked: "; the score of the other 10 is 20.0 % (...), of all 33.3 %"; "" where
    none are left."""
    if not left["rows"]:
        return ""
    value, unit = figure(left["value"], tuned.unit), tuned.unit
    whole = float(np.nanmean(tuned.values)) if not np.isnan(tuned.values).all() else None
    return f"; the score of the other {left['rows']} is {value} ({ends(left, unit)}), of all {figure(whole, unit)}"


def _rare_texts(figures: Mapping[str, Any]) -> str:
    """Says how many rows whose picture was not found have a text as that of a copy; "" where it is less than half of
    these rows, or they are too few to tell.

    Example: 12 rows, 2 of them found, 10 others with such a text -> "question and answer of 10 of the other 10 rows
    stand in just one row of training each, as those of copies do".
    """
    rows, once = figures["not_found"], figures["same_rare_texts_not_found"]
    if rows < LEAST_ROWS or once < MOST_TEXTS * rows:
        return ""
    some = f"of {once} of {'' if rows == figures['rows'] else 'the other '}{counted(rows, 'row')}"
    return f"question and answer {some} stand in just one row of training each, as those of copies do"


def _without(leaked: Sequence[int], tuned: Column, base: Column | None) -> dict[str, Any]:
    """The scores of the rows that have not leaked."""
    rest = np.setdiff1d(np.arange(len(tuned.values)), leaked)
    found = compare(tuned.part(rest), None if base is None else base.part(rest))
    return {"metric": tuned.name, "tuned": found.pop("one"), "base": found.pop("other"), **found}


def _named(pair: _Pair, rows: Sequence[Row], known_rows: Sequence[Row]) -> dict[str, Any]:
    """A pair as it is written down."""
    mine, other = rows[pair.row], known_rows[pair.known]
    return {
        "shares": "image and text" if pair.leaked else "image",
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
