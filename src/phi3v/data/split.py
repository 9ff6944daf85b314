"""Which rows are validation rows, when a set has none of its own.

In come one key per row (the names or contents of its images, or its text); out come row numbers. A row's side depends
on its own group and on the seed, so it stays there when other rows are added or the order changes, and rows that share
an image stay together. Knows nothing about files, columns or images.
"""

import hashlib
from collections.abc import Sequence

from phi3v.errors import DataError


def split_rows(keys: Sequence[Sequence[str]], validation: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers of the training and of the validation rows, both ascending.

    Every group of rows that share a key gets a number between 0 and 1 from a hash of the seed and its smallest key.
    A share (float) takes the groups below it, so its size is near the share and not exact; at least one group is on
    each side. A number of rows (int) takes the groups with the smallest hashes, leaving out a group that would pass the
    number.

    Args:
        keys: for each row the keys that tie it to other rows, one at least.
        validation: a number of rows (int) or a share between 0.0 and 1.0 (float).
        seed: another seed gives another choice.
    Example: keys [["a"], ["b"], ["a"]] with validation=1 -> ([0, 2], [1]) for any seed: rows 0 and 2 belong together.
    Raises: DataError when there are too few rows or groups.
    """
    groups = sorted(group_rows(keys), key=lambda group: _hash(seed, min(key for row in group for key in keys[row])))
    if len(groups) < 2:
        raise DataError(
            f"{len(keys)} rows with {len(groups)} different images cannot be split into train and validation; "
            "give data.validation, or data.split: null for none"
        )
    if isinstance(validation, int):
        chosen = _take_number(groups, validation)
        if not 0 < len(chosen) < len(keys):
            raise DataError(
                f"data.split.validation asks for {validation} of {len(keys)} usable rows, which cannot be split off: "
                "lower it, or give data.validation"
            )
    else:
        below = [group for group in groups if _hash(seed, min(k for row in group for k in keys[row])) < validation]
        below = below or groups[:1]
        chosen = [row for group in below[: len(groups) - 1] for row in group]
    held_out = set(chosen)
    return [row for row in range(len(keys)) if row not in held_out], sorted(held_out)


def group_rows(keys: Sequence[Sequence[str]]) -> list[list[int]]:
    """Rows that share a key, directly or through other rows, as groups in the order of their first row.

    Example: [["a"], ["b", "c"], ["a", "d"], ["c"]] -> [[0, 2], [1, 3]].
    """
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[str, int] = {}
    for row, row_keys in enumerate(keys):
        for key in row_keys:
            low, high = sorted((root(first.setdefault(key, row)), root(row)))
            parent[high] = low
    groups: dict[int, list[int]] = {}
    for row in range(len(keys)):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


def _take_number(groups: list[list[int]], number: int) -> list[int]:
    """Rows of the first groups that fit: [[0], [1, 2], [3]] with 2 -> [0, 3]."""
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group) <= number:
            chosen += group
    return chosen


def _hash(seed: int, key: str) -> float:
    """A number in [0, 1) that a key and a seed always give."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
