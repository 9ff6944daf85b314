"""`show_recipe(recipe)`: some rows of a recipe's data as people and as the model see them. Loads no weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi3v.data.check import listed
from phi3v.data.fetch import fetch_images
from phi3v.data.reading import Reading
from phi3v.data.schema import ImageRef, Row
from phi3v.data.show import ShownRow, show_row, spaced
from phi3v.data.show_page import render_rows
from phi3v.first_look import Progress, find_rows
from phi3v.loading import load_config, load_processor
from phi3v.recipe import Recipe


@dataclass(frozen=True)
class Shown:
    """Some rows and where they come from.

    Attributes:
        source: the set.
        model: whose tokens they are.
        rows: rows read.
        usable: rows that can be used, by their headers.
        problems: rows that are left out, as `data.check.listed` gives them.
        shown: some of the training rows.
    """

    source: str
    model: str
    rows: int
    usable: int
    problems: list[dict[str, Any]]
    shown: Sequence[ShownRow]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without pictures."""
        return {**vars(self), "shown": [row.to_dict() for row in self.shown]}

    def page(self) -> str:
        """The rows as one HTML page."""
        return render_rows(self.source, {"rows": self.rows, "usable": self.usable, "model": self.model}, self.shown)


def show_recipe(recipe: Recipe, *, rows: int = 8, on_progress: Progress | None = None) -> Shown:
    """Training rows of a recipe, evenly spaced over the set, so that nobody picked the good ones.

    Args:
        recipe: whose data, images and model.
        rows: how many.
        on_progress: called as images are downloaded, those of the rows that are shown and no others.
    Raises: DataError, CheckpointError: the set or the model's small files cannot be read.
    """
    name = recipe.model.name
    processor = load_processor(name, revision=recipe.model.revision, **recipe.image.processor_options)
    context = load_config(name, revision=recipe.model.revision).max_position_embeddings
    how: dict[str, Any] = {
        "train_on": recipe.data.train_on,
        "max_length": recipe.data.max_length or context,
        "on_too_long": recipe.data.on_too_long,
        "max_pixels": recipe.image.max_pixels,
    }
    data = find_rows(recipe, download=False, on_progress=on_progress)
    chosen = [data.train[position] for position in spaced(len(data.train), rows)]
    shown = [
        row if isinstance(row, ShownRow) else show_row(row, processor, **how)
        for row in _with_images(chosen, recipe, on_progress)
    ]
    problems = listed(data.problems)
    return Shown(recipe.data.train_name, name, data.rows_in, data.rows_in - len(problems), problems, shown)


def _with_images(rows: Sequence[Row], recipe: Recipe, on_progress: Progress | None) -> list[Row | ShownRow]:
    """The rows with the files of images that were still to be downloaded, or with why these did not come."""
    reading = Reading.of(**recipe.data.reading_options)
    missing = [image.url for row in rows for image in row.images if image.path is None and image.url is not None]
    if not missing or reading.cache is None:
        return list(rows)
    told = None if on_progress is None else lambda done, total: on_progress("downloading images", done, total)
    failures = fetch_images(missing, reading.cache, reading.limits, on_progress=told).failures
    cache = reading.cache

    def here(image: ImageRef) -> ImageRef:
        found = cache.path(image.url) if image.url is not None and image.path is None else None
        return image if found is None else replace(image, path=str(found))

    complete: list[Row | ShownRow] = []
    for row in rows:
        failed = [failures[image.url] for image in row.images if image.url in failures]
        if failed:
            complete.append(ShownRow(row.source, row.index, [], [], failed[0].message))
        else:
            complete.append(replace(row, images=tuple(map(here, row.images))))
    return complete
