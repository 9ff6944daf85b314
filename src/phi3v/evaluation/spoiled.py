"""Rows whose images are spoiled: a uniform grey of the same size, or those of another row with another answer.

In come rows, out come rows with the same questions and expected answers but other images. Asks no model.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from phi3v.data.images import image_size
from phi3v.data.schema import ImageRef, Row
from phi3v.errors import DataError

GREY = (128, 128, 128)


def blank_images(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows with every image replaced by a grey one of its size, made when a row is asked for."""
    return _BlankRows(rows)


def swap_images(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Pairs each row with another one whose images it can be shown: as many images, other ones, another answer.

    The partner is the first fitting row from half the list onwards, so that neighbours, which often are alike, do not
    meet; a row without a partner is left out. Unopened rows are small, so both lists are whole.

    Example: answers [cat, dog, cat, dog] -> own [0, 1, 2, 3], others [3, 0, 1, 2]: row 0 looks at row 2 (a cat), then
    at row 3.
    Raises: DataError when no row has a partner.
    """
    everyone = list(rows)
    own, others = [], []
    for position, row in enumerate(everyone):
        start = position + len(everyone) // 2
        for step in range(len(everyone)):
            other = everyone[(start + step) % len(everyone)]
            if len(other.images) == len(row.images) > 0 and other.answer != row.answer and other.images != row.images:
                own.append(row)
                others.append(other)
                break
    if not own:
        raise DataError(
            f"no row of {len(everyone)} finds another with as many images, other ones, and another answer to swap with"
        )
    return own, others


class _BlankRows(Sequence[Row]):
    """Rows whose images are grey; nothing is painted before a row is asked for."""

    def __init__(self, rows: Sequence[Row], painted: dict[tuple[int, int], ImageRef] | None = None) -> None:
        self._rows = rows
        self._painted = {} if painted is None else painted

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _BlankRows(self._rows[index], self._painted)
        row = self._rows[index]
        return replace(row, images=tuple(self._grey(image_size(image)) for image in row.images))

    def _grey(self, size: tuple[int, int]) -> ImageRef:
        """The grey image of a size, the same one for all rows: it goes through the tower once."""
        if size not in self._painted:
            self._painted[size] = _grey(size)
        return self._painted[size]


def _grey(size: tuple[int, int]) -> ImageRef:
    """A grey image."""
    buffer = io.BytesIO()
    Image.new("RGB", size, GREY).save(buffer, format="PNG")
    return ImageRef(path=f"grey, {size[0]}x{size[1]}", data=buffer.getvalue())
