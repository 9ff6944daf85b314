"""Which rows are validation rows, when a set has none of its own.

In come the keys of each row (the contents of its images, or its text); out come row numbers. One of a row's own keys
and the seed decide its side, nothing else, so no row changes sides when others are added or the order changes. No image
is on both sides: a training row with an image of a validation row is left out. Knows nothing about files or columns.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from phi3v.errors import DataError


@dataclass(frozen=True)
class Split:
    """Row numbers, each list ascending; every row is in one of them.

    Attributes:
        train: to train on.
        validation: held out.
        left_out: of the training side, with an image of a validation row.
    """

    train: list[int]
    validation: list[int]
    left_out: list[int]


def split_rows(keys: Sequence[Sequence[str]], validation: float, seed: int) -> Split:
    """Divides rows into training and validation rows.

    Every row has an anchor, one of its keys (its only one, for a row with one image), and every anchor a number between
    0 and 1 from a hash of seed and key. A share (float) takes the rows with anchors below it, so its size is near the
    share and not exact; at least one anchor is on each side. A number of rows (int) takes the anchors with the smallest
    numbers, passing over one whose rows would exceed it; so rows that are added can push out as many.

    Args:
        keys: for each row its keys, one at least.
        validation: a number of rows (int) or a share between 0.0 and 1.0 (float).
        seed: another seed gives another choice.
    Example: keys [["a"], ["b"], ["a"]] with validation=1 -> train [0, 2], validation [1] for any seed: two rows of one
        image are more than one row. Where "a" is held out and "b" is not, a row ["b", "a"] with the anchor "b" is left
        out.
    Raises: DataError when there are too few rows or images.
    """
    groups: dict[str, list[int]] = {}
    for row, row_keys in enumerate(keys):
        groups.setdefault(_anchor(row_keys), []).append(row)
    way_out = "give data.validation, or data.split: null for none"
    if len(groups) < 2:
        what = f"{len(keys)} rows of the same image" if len(keys) > 1 else f"{len(keys) or 'no'} usable row"
        raise DataError(f"{what} cannot be split into train and validation: {way_out}")
    numbers = {anchor: _hash(str(seed), anchor) for anchor in groups}
    order = sorted(groups, key=lambda anchor: numbers[anchor])
    if isinstance(validation, int):
        chosen = _take_number([groups[anchor] for anchor in order], validation)
        if not 0 < len(chosen) < len(keys):
            raise DataError(
                f"data.split.validation asks for {validation} of {len(keys)} usable rows, which cannot be split off: "
                "lower it, or give data.validation"
            )
    else:
        below = sum(number < validation for number in numbers.values())
        held_anchors = order[: min(max(below, 1), len(order) - 1)]
        chosen = [row for anchor in held_anchors for row in groups[anchor]]
    held_out = set(chosen)
    held_keys = {key for row in chosen for key in keys[row]}
    rest = [row for row in range(len(keys)) if row not in held_out]
    train = [row for row in rest if held_keys.isdisjoint(keys[row])]
    if not train:
        raise DataError(f"the rows cannot be split: each shares an image with a row that would be held out; {way_out}")
    kept = set(train)
    return Split(train, sorted(held_out), [row for row in rest if row not in kept])


def _anchor(keys: Sequence[str]) -> str:
    """The key that decides for a row, whatever their order."""
    return keys[0] if len(keys) == 1 else min(keys, key=lambda key: _hash("anchor", key))


def _take_number(groups: list[list[int]], number: int) -> list[int]:
    """Rows of the first groups that fit: [[0], [1, 2], [3]] with 2 -> [0, 3]."""
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group) <= number:
            chosen += group
    return chosen


def _hash(seed: str, key: str) -> float:
    """A number in [0, 1) that a key and a seed always give."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
