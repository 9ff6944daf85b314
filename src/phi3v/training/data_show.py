"""`show_recipe(recipe)`: some rows of a recipe's data as people and as the model see them. Loads no weights.

Which rows can be used is judged as `check_recipe` judges it, so both say the same numbers and the same reasons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi3v.data.augment import Change
from phi3v.data.check import listed
from phi3v.data.fetch import fetch_images
from phi3v.data.image_cache import FetchFailure
from phi3v.data.judging import describe_problems
from phi3v.data.reading import Reading
from phi3v.data.schema import ImageRef, Row, RowProblem
from phi3v.data.show import ShownRow, show_row, spaced
from phi3v.data.show_page import render_rows
from phi3v.first_look import FoundRows, Progress, survey_data, survey_options, survey_rows
from phi3v.loading import load_config, load_processor
from phi3v.recipe import Recipe
from phi3v.training.data_check import rows_or_trouble
from phi3v.training.samples import augmented_images


@dataclass(frozen=True)
class Shown:
    """Some rows and where they come from.

    Attributes:
        source: the set.
        model: whose tokens they are.
        rows: rows read.
        usable: rows that can be used.
        problems: rows that are left out, as `data.check.listed` gives them.
        decoded: whether every image was decoded, or headers were taken for enough.
        shown: some of the training rows.
    """

    source: str
    model: str
    rows: int
    usable: int
    problems: list[dict[str, Any]]
    decoded: bool
    shown: Sequence[ShownRow]

    @property
    def trouble(self) -> str | None:
        """Why there is no row to show; None where there is one."""
        if self.shown:
            return None
        problems = [
            RowProblem(*(one[key] for key in ("row", "reason_code", "message", "source"))) for one in self.problems
        ]
        return f"no row can be shown: {describe_problems(problems, self.rows, self.source)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without pictures."""
        return {**vars(self), "shown": [row.to_dict() for row in self.shown]}

    def page(self) -> str:
        """The rows as one HTML page."""
        return render_rows(self.source, {"rows": self.rows, "usable": self.usable, "model": self.model}, self.shown)


def show_recipe(recipe: Recipe, *, rows: int = 8, decode: bool = True, on_progress: Progress | None = None) -> Shown:
    """Training rows of a recipe, evenly spaced over the set, so that nobody picked the good ones.

    Args:
        recipe: whose data, images and model.
        rows: how many.
        decode: decode every image of the set, as a check does; False takes headers for enough.
        on_progress: called as rows are looked at and images downloaded, those of the rows that are shown and no others.
    Raises: DataError, CheckpointError: the set or the model's small files cannot be read.
    """
    name = recipe.model.name
    processor = load_processor(name, revision=recipe.model.revision, **recipe.image.processor_options)
    context = load_config(name, revision=recipe.model.revision).max_position_embeddings
    how: dict[str, Any] = {
        "train_on": recipe.data.train_on,
        "max_length": recipe.data.longest(context),
        "on_too_long": recipe.data.on_too_long,
        "max_pixels": recipe.image.max_pixels,
    }
    data, _ = rows_or_trouble(recipe, download=False, on_progress=on_progress)
    options = survey_options(recipe, context, decode=decode, hashes=False)
    problems = survey_data(data, processor, options, on_progress=on_progress)[2]
    wrong = {(problem.source, problem.row): problem.message for problem in problems}
    positions = spaced(len(data.train), rows)
    complete = _with_images([data.train[position] for position in positions], wrong, recipe, on_progress)
    changes = _first_changes(recipe, data, processor, context, positions)
    shown = [
        row if isinstance(row, ShownRow) else show_row(row, processor, change=change, **how)
        for row, change in zip(complete, changes, strict=True)
    ]
    usable = data.rows_in - len(problems)
    return Shown(recipe.data.train_name, name, data.rows_in, usable, listed(problems), decode, shown)


def _first_changes(
    recipe: Recipe, data: FoundRows, processor: Any, context: int, positions: Sequence[int]
) -> list[Change | None]:
    """What training does in its first epoch to the images of the rows in some positions; None for nothing.

    Draws follow from a row's place among those that training reads, which are judged by headers: rows that decoding
    alone shows to be bad keep their place there.
    """
    augmented = augmented_images(recipe)
    if augmented is None:
        return [None for _ in positions]
    options = survey_options(recipe, context, decode=False, hashes=False)
    kept = survey_rows(data.train, processor, options).kept
    places = {position: place for place, position in enumerate(kept)}
    return [augmented.of(places[position]) if position in places else None for position in positions]


def _with_images(
    rows: Sequence[Row], wrong: Mapping[tuple[str, int], str], recipe: Recipe, on_progress: Progress | None
) -> list[Row | ShownRow]:
    """The rows with the files of images that were still to be downloaded, or with why they cannot be shown."""
    reading = Reading.of(**recipe.data.reading_options)
    missing = [image.url for row in rows for image in row.images if image.path is None and image.url is not None]
    told = None if on_progress is None else lambda done, total: on_progress("downloading images", done, total)
    cache = reading.cache
    failures: Mapping[str, FetchFailure] = {}
    if missing and cache is not None:
        failures = fetch_images(missing, cache, reading.limits, on_progress=told).failures

    def here(image: ImageRef) -> ImageRef:
        found = cache.path(image.url) if cache and image.url is not None and image.path is None else None
        return image if found is None else replace(image, path=str(found))

    complete: list[Row | ShownRow] = []
    for row in rows:
        failed = [failures[image.url].message for image in row.images if image.url and image.url in failures]
        if (row.source, row.index) in wrong:
            complete.append(ShownRow(row.source, row.index, [], [], wrong[row.source, row.index]))
        elif failed:
            complete.append(ShownRow(row.source, row.index, [], [], failed[0]))
        else:
            complete.append(replace(row, images=tuple(map(here, row.images))))
    return complete
