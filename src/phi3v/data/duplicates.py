"""Rows that are there twice, and rows of which training has seen what validation asks.

In come the facts of training and validation rows; out come counts and the first few places. The same image means the
same content, whatever it is called; the same row means the same images and the same text.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from phi3v.data.survey import RowFacts

Place = tuple[str, int]
"""Source and row."""

SHOWN = 20
"""Groups that are listed by name; all are counted."""


@dataclass(frozen=True)
class Duplicates:
    """What is there more than once.

    Example: train rows 0 and 1 with the same image and text, and validation row 5 with the same image and another
    question, are rows_in_train=1, images_in_train=1, rows_in_validation=0, rows_in_both=0, images_in_both=1.

    Attributes:
        rows_in_train: training rows that repeat an earlier one.
        images_in_train: training rows whose images repeat those of an earlier one.
        rows_in_validation: validation rows that repeat an earlier one, so that it counts more than once in a score.
        rows_in_both: validation rows that training has too: their score says nothing.
        images_in_both: validation rows with an image that training has too.
        examples: the first groups, each with what they share ("row" or "image") and the places.
    """

    rows_in_train: int
    images_in_train: int
    rows_in_validation: int
    rows_in_both: int
    images_in_both: int
    examples: list[tuple[str, list[Place]]]


def find_duplicates(train: Sequence[RowFacts], validation: Sequence[RowFacts]) -> Duplicates:
    """Finds what is the same within training rows, within validation rows, and between them."""
    rows: dict[tuple[bytes, ...], list[Place]] = defaultdict(list)
    images: dict[tuple[bytes, ...], list[Place]] = defaultdict(list)
    single: dict[bytes, Place] = {}
    for fact in train:
        rows[_key(fact)].append((fact.source, fact.row))
        if fact.images:
            images[fact.images].append((fact.source, fact.row))
        for image in fact.images:
            single.setdefault(image, (fact.source, fact.row))
    held_out: dict[tuple[bytes, ...], list[Place]] = defaultdict(list)
    for fact in validation:
        held_out[_key(fact)].append((fact.source, fact.row))
    again = [places for places in rows.values() if len(places) > 1]
    asked_again = [places for places in held_out.values() if len(places) > 1]
    pictured = [places for places in images.values() if len(places) > 1]
    both = [[rows[_key(fact)][0], (fact.source, fact.row)] for fact in validation if _key(fact) in rows]
    seen = [
        [single[image], (fact.source, fact.row)]
        for fact in validation
        for image in [next((image for image in fact.images if image in single), None)]
        if image is not None
    ]
    same_images = {tuple(places): "image" for places in [*seen, *pictured]}
    groups = {tuple(places): "row" for places in [*both, *asked_again, *again]}
    examples = [(kind, list(places)) for places, kind in (groups | (same_images | groups)).items()]
    return Duplicates(
        sum(len(places) - 1 for places in again),
        sum(len(places) - 1 for places in pictured),
        sum(len(places) - 1 for places in asked_again),
        len(both),
        len(seen),
        examples[:SHOWN],
    )


def _key(fact: RowFacts) -> tuple[bytes, ...]:
    """What makes two rows the same."""
    return (fact.text, *fact.images)
