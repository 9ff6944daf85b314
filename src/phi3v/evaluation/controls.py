"""Does a model read its pictures? Ask again with the pictures spoiled, and look whether the score falls.

In comes a TARGET, out come its scores with grey images and with those of other rows (`spoiled`). A model that looks
falls to what one constant answer gets; a model that does not look keeps its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phi3v.data.schema import Row
from phi3v.evaluation.answers import answer_rows
from phi3v.evaluation.image_groups import image_groups
from phi3v.evaluation.metrics import exact_match
from phi3v.evaluation.run import Progress, See, answer_options, feature_store, held_out_rows, seeing
from phi3v.evaluation.shares import Share
from phi3v.evaluation.spoiled import blank_images, swap_images
from phi3v.features.store import FeatureStore
from phi3v.loading import load_target
from phi3v.targets import resolve_target


@dataclass(frozen=True)
class Controls:
    """Scores of a target whose images were spoiled.

    Attributes:
        blanked: exact match with the expected answer when every image is grey; None where that was not asked.
        swapped: exact match with the row's own answer when it was shown another row's images.
        follows_swap: exact match with the answer that belongs to the images shown; high for a model that looks.
    """

    blanked: Share | None
    swapped: Share
    follows_swap: Share


def answer_controls(
    target: str | Path,
    data: str | Path | None = None,
    *,
    rows: int | None = None,
    blank: bool = True,
    on_progress: Progress = lambda stage, done, total: None,
    features: FeatureStore | None = None,
) -> Controls:
    """Asks a target about held-out rows with spoiled images; the arguments are those of `evaluation.run.evaluate`.

    `blank` False leaves grey images out, which the check `images` of an evaluation has asked about already.
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

    blanked = answers("with grey images", blank_images(held_out.rows)) if blank else None
    swapped = answers("with swapped images", shown, kept)
    groups = image_groups(shown)  # who misreads the photo that is shown is wrong in all that is asked about it
    return Controls(
        None if blanked is None else exact_match([row.answer for row in held_out.rows], blanked, held_out.groups),
        exact_match([row.answer for row in own], swapped, groups),
        exact_match([row.answer for row in others], swapped, groups),
    )
