"""Which rows are validation rows, when a set has none of its own.

In come the keys of each row (the contents of its image files, or its text); out come row numbers. With a share, one of
a row's own keys and the seed decide its side, so no row changes sides when others are added or the order changes; a
number of rows is exact and cannot be stable, too. No key is on both sides: a training row with an image of a validation
row is left out. What looks the same and has other keys, a picture saved in two formats, is not seen here: that takes
decoding every image, which `phi3v data check` does and a training does not wait for. Knows nothing about files or
columns.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    share and not exact. At least one anchor is on each side: where none lies below the share, or all do, the nearest
    one goes over, and back once there are others: the only case of rows that change sides. A number of rows (int)
    takes the anchors with the smallest numbers, passing over one whose rows would exceed it; so rows that are added can
    push out as many.

    Args:
        keys: for each row its keys, one at least.
        validation: a number of rows (int) or a share between 0.0 and 1.0 (float).
        seed: another seed gives another choice.
    Example: keys [["a"], ["b"], ["a"]] with validation=1 -> train [0, 2], validation [1] for any seed: two rows of one
        image are more than one row. Where "a" is held out and "b" is not, a row ["b", "a"] with the anchor "b" is left
        out.
    Raises: DataError when there are too few rows or images.
    """
    anchors, numbers, ids, ends = array("Q"), array("Q"), array("Q"), array("q")
    for row_keys in keys:
        anchor = _anchor(row_keys)
        anchors.append(_hash("anchor", anchor))
        numbers.append(_hash(str(seed), anchor))
        ids.extend(_hash("anchor", key) for key in row_keys)
        ends.append(len(ids))
    _, firsts, group_of, sizes = np.unique(
        np.array(anchors), return_index=True, return_inverse=True, return_counts=True
    )
    way_out = "give data.validation, or data.split: null for none"
    if not len(firsts):
        raise DataError("no row can be used, so none can be held out: mend the data")
    if len(firsts) < 2:
        what = f"{len(keys)} rows of the same image" if len(keys) > 1 else f"{len(keys)} usable row"
        raise DataError(f"{what} cannot be split into train and validation: {way_out}")
    of_group = np.array(numbers)[firsts]
    chosen = _choose(of_group, sizes, validation)
    if not len(chosen) or len(chosen) == len(sizes):
        raise DataError(
            f"data.split.validation asks for {validation} of {len(keys)} usable rows, which cannot be split off: "
            "lower it, or give data.validation"
        )
    held_out = np.isin(group_of, chosen)
    row_of = np.repeat(np.arange(len(keys)), np.diff(ends, prepend=0))
    shared = np.isin(ids, np.array(ids)[held_out[row_of]])
    left_out = np.zeros(len(keys), dtype=bool)
    left_out[row_of[shared]] = True
    left_out &= ~held_out
    if (held_out | left_out).all():
        raise DataError(f"the rows cannot be split: each shares an image with a row that would be held out; {way_out}")
    sides = (~held_out & ~left_out, held_out, left_out)
    return Split(*(np.flatnonzero(side).tolist() for side in sides))


def _anchor(keys: Sequence[str]) -> str:
    """The key that decides for a row, whatever their order."""
    return keys[0] if len(keys) == 1 else min(keys, key=lambda key: _hash("anchor", key))


def _choose(numbers: np.ndarray, sizes: np.ndarray, validation: float) -> np.ndarray:
    """The groups that are held out, by the number of each and its rows.

    Example: sizes 1, 2, 1 with ascending numbers and validation=2 -> the groups 0 and 2, for 1 + 2 rows are too many.
    """
    order = np.argsort(numbers, kind="stable")
    if not isinstance(validation, int):
        below = int((numbers / 2**64 < validation).sum())
        return order[: min(max(below, 1), len(order) - 1)]
    chosen, rows = [], 0
    for group in order.tolist():
        if rows + sizes[group] <= validation:
            chosen.append(group)
            rows += int(sizes[group])
        if rows == validation:
            break
    return np.array(chosen, dtype=np.int64)


def _hash(seed: str, key: str) -> int:
    """A number of 64 bits that a key and a seed always give."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")
