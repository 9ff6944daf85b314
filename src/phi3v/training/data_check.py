"""`check_recipe(recipe)`: everything about a recipe's data that can be known before a GPU is rented.

In comes a recipe, out comes a `data.check.Report`. Reads the model's config, tokenizer and preprocessor and never its
weights; prints nothing.
"""

from dataclasses import asdict
from typing import Any

from phi3v.data.check import (
    Images,
    Report,
    count_images,
    count_reasons,
    crop_prices,
    length_spreads,
    listed,
    rows_beyond,
)
from phi3v.data.duplicates import find_duplicates
from phi3v.data.sources import MAX_PROBLEM_SHARE
from phi3v.first_look import Progress, Surveyed, open_data, survey_options, survey_rows
from phi3v.loading import load_config, load_processor
from phi3v.recipe import Recipe
from phi3v.training.outlook import outlook


def check_recipe(
    recipe: Recipe, *, model: bool = True, decode: bool = True, on_progress: Progress | None = None
) -> Report:
    """Looks at every row of a recipe's data.

    Args:
        recipe: whose data, limits and model.
        model: False counts no tokens: the recipe's model is only a stand-in.
        decode: decode every image; False is quicker and takes the header for enough.
        on_progress: called as rows are looked at.
    Raises: DataError, CheckpointError: the set or the model's small files cannot be read at all.
    """
    name, revision = recipe.model.name, recipe.model.revision
    processor = load_processor(name, num_crops=recipe.image.num_crops, revision=revision) if model else None
    config = load_config(name, revision=revision) if model else None
    context = recipe.data.max_length or (config.max_position_embeddings if config is not None else None)
    data = open_data(recipe)
    options = survey_options(recipe, decode=decode, hashes=True)
    told: dict[str, Any] = {"max_length": context, "on_progress": on_progress}
    train = survey_rows(data.train, processor, options, **told)
    held_out = survey_rows(data.validation or [], processor, options, stage="looking at the held-out rows", **told)
    problems = sorted(
        [*data.problems, *train.problems, *held_out.problems], key=lambda problem: (problem.source, problem.row)
    )
    facts = [*train.facts, *held_out.facts]
    rows = len(data.train) + len(data.validation or []) + len(data.problems)
    crops = recipe.image.num_crops if processor is None else processor.image_processor.num_crops
    rope_limit = config.original_max_position_embeddings if config is not None else None
    return Report(
        source=str(recipe.data.train),
        rows=rows,
        usable=rows - len(problems),
        train=len(train.kept),
        validation=len(held_out.kept),
        origin=data.origin,
        problems=listed(problems),
        reasons=count_reasons(problems),
        max_skipped=MAX_PROBLEM_SHARE,
        on_problem="skip",
        decoded=decode,
        images=Images(count_images(facts), 0, []),
        model=name if model else None,
        num_crops=crops,
        lengths=length_spreads(facts) if model else {},
        context=context,
        beyond_context=sum(problem.reason_code == "too_long" for problem in problems),
        rope_limit=rope_limit,
        beyond_rope=rows_beyond(facts, rope_limit),
        duplicates=find_duplicates(train.facts, held_out.facts),
        crops=crop_prices(facts, num_crops=crops, context=context),
        outlook=_outlook(recipe, train, config, crops) if model else None,
    )


def _outlook(recipe: Recipe, train: Surveyed, config: Any, num_crops: int | None) -> dict[str, Any]:
    """Steps and time of the run as plain values."""
    return asdict(outlook(recipe, len(train.kept), train.facts, config, num_crops))
