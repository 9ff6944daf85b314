"""Rows that are there twice, and rows of which training has seen what validation asks.

In come the facts of training and validation rows; out come counts and the first few places. The same image means the
same content, whatever it is called; the same row means the same images and the same text.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from phi3v.data.fact_table import digest_array
from phi3v.data.survey import DIGEST_BYTES, RowFacts

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
    """Finds what is the same within training rows, within validation rows, and between them.

    Facts are gone through one by one and only hashes of them kept.
    """
    rows, held_out = (digest_array(map(_row_digest, facts)) for facts in (train, validation))
    pictured = array("q", (place for place, fact in enumerate(train) if fact.images))
    pictures = digest_array(_joined(train[place].images) for place in pictured)
    single, owners = _images(train)
    asked, askers = _images(validation)
    again, asked_again, same_pictures = _Groups(rows), _Groups(held_out), _Groups(pictures)
    both = _met(rows, held_out)
    seen = {askers[place]: owners[first] for place, first in reversed(_met(single, asked))}  # of a row its first image

    def places(facts: Sequence[RowFacts], numbers: Iterable[int]) -> list[Place]:
        return [(fact.source, fact.row) for fact in (facts[int(number)] for number in numbers)]

    def groups() -> Iterator[tuple[str, list[Place]]]:
        for place, first in both:
            yield "row", places(train, [first]) + places(validation, [place])
        yield from (("row", places(validation, group)) for group in asked_again.members())
        yield from (("row", places(train, group)) for group in again.members())
        for place in sorted(seen):
            yield "image", places(train, [seen[place]]) + places(validation, [place])
        yield from (("image", places(train, [pictured[one] for one in group])) for group in same_pictures.members())

    shown: dict[tuple[Place, ...], str] = {}
    for kind, group in groups():
        shown.setdefault(tuple(group), kind)
        if len(shown) == SHOWN:
            break
    return Duplicates(
        again.repeats,
        same_pictures.repeats,
        asked_again.repeats,
        len(both),
        len(seen),
        [(kind, list(group)) for group, kind in shown.items()],
    )


class _Groups:
    """Which hashes are there more than once.

    Example: hashes a, b, a, a -> 2 repeats, and one group with the members [0, 2, 3].
    """

    def __init__(self, digests: np.ndarray) -> None:
        distinct, self._first, self._group, counts = np.unique(
            digests, return_index=True, return_inverse=True, return_counts=True
        )
        self.repeats = len(digests) - len(distinct)
        self._several = np.flatnonzero(counts > 1)

    def members(self) -> Iterator[list[int]]:
        """The members of each group, the group that begins first before others."""
        for group in self._several[np.argsort(self._first[self._several])]:
            yield np.flatnonzero(self._group == group).tolist()


def _met(known: np.ndarray, asked: np.ndarray) -> list[tuple[int, int]]:
    """Where hashes stand among known ones: known a, b, a and asked b, c, a -> (0, 1), (2, 0)."""
    if not len(known):
        return []
    distinct, first = np.unique(known, return_index=True)
    places = np.searchsorted(distinct, asked).clip(max=len(distinct) - 1)
    found = np.flatnonzero(distinct[places] == asked)
    return list(zip(found.tolist(), first[places[found]].tolist(), strict=True))


def _images(facts: Sequence[RowFacts]) -> tuple[np.ndarray, array]:
    """The hashes of all images, and for each the number of its fact."""
    owners = array("q", (place for place, fact in enumerate(facts) for _ in fact.images))
    return digest_array(image for fact in facts for image in fact.images), owners


def _row_digest(fact: RowFacts) -> bytes:
    """What makes two rows the same."""
    return _joined((fact.text, *fact.images))


def _joined(digests: tuple[bytes, ...]) -> bytes:
    """One hash for several, whose order counts."""
    return blake2b(b"".join(digests), digest_size=DIGEST_BYTES).digest()
