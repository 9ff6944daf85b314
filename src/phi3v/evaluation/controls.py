"""Does a model read its pictures? Ask again with the pictures spoiled, and look whether the score falls.

In come rows, out come rows with the same questions and expected answers but other images: a uniform grey of the same
size (`blank_images`), or those of another row with another answer (`swap_images`). `answer_controls` asks a TARGET
about both. A model that looks falls to what one constant answer gets; a model that does not look keeps its score.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from phi3v.data.images import image_size
from phi3v.data.schema import ImageRef, Row
from phi3v.errors import DataError
from phi3v.evaluation.answers import answer_rows
from phi3v.evaluation.run import Progress, See, answer_options, feature_store, held_out_rows, seeing
from phi3v.evaluation.shares import Share, exact_match
from phi3v.features.store import FeatureStore
from phi3v.loading import load_target
from phi3v.targets import resolve_target

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Controls:
    """Scores of a target whose images were spoiled.

    Attributes:
        blanked: exact match with the expected answer when every image is grey.
        swapped: exact match with the row's own answer when it was shown another row's images.
        follows_swap: exact match with the answer that belongs to the images shown; high for a model that looks.
    """

    blanked: Share
    swapped: Share
    follows_swap: Share


def answer_controls(
    target: str | Path,
    data: str | Path | None = None,
    *,
    rows: int | None = None,
    on_progress: Progress = lambda stage, done, total: None,
    features: FeatureStore | None = None,
) -> Controls:
    """Asks a target about held-out rows with spoiled images; the arguments are those of `evaluation.run.evaluate`.

    Swapped images are those of the rows, so kept features are used for them; grey ones are not worth keeping.

    Raises:
        DataError: no row has a partner with as many images and another answer.
    """
    place = resolve_target(target)
    held_out = held_out_rows(place, data, rows)
    loaded = load_target(target, **held_out.recipe.loading_options)
    settings = answer_options(held_out.recipe)
    kept = seeing(loaded.model, feature_store(held_out.recipe, features))
    own, others = swap_images(held_out.rows)
    shown = [replace(row, images=other.images) for row, other in zip(own, others, strict=True)]

    def answers(stage: str, asked: Sequence[Row], see: See = None) -> list[str]:
        def count(done: int) -> None:
            on_progress(stage, done, len(asked))

        return answer_rows(loaded.model, loaded.processor, asked, **settings, see=see, on_row=count).texts

    blanked = answers("with grey images", blank_images(held_out.rows))
    swapped = answers("with swapped images", shown, kept)
    return Controls(
        exact_match([row.answer for row in held_out.rows], blanked),
        exact_match([row.answer for row in own], swapped),
        exact_match([row.answer for row in others], swapped),
    )


def blank_images(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows with every image replaced by a grey one of its size, made when a row is asked for."""
    return _BlankRows(rows)


def swap_images(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Pairs each row with another one whose images it can be shown: as many images, another answer.

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
            if len(other.images) == len(row.images) > 0 and other.answer != row.answer:
                own.append(row)
                others.append(other)
                break
    if not own:
        raise DataError(f"no row of {len(everyone)} finds another with as many images and another answer to swap with")
    return own, others


class _BlankRows(Sequence[Row]):
    """Rows whose images are grey; nothing is painted before a row is asked for."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _BlankRows(self._rows[index])
        row = self._rows[index]
        return replace(row, images=tuple(_grey(image) for image in row.images))


def _grey(image: ImageRef) -> ImageRef:
    """A grey image of the same size."""
    buffer = io.BytesIO()
    Image.new("RGB", image_size(image), GREY).save(buffer, format="PNG")
    return ImageRef(path=f"grey for {image.path}", data=buffer.getvalue())
