"""`check_recipe(recipe)`: everything about a recipe's data that can be known before a GPU is rented.

In comes a recipe, out comes a `data.check.Report`. Reads the model's config, tokenizer and preprocessor and never its
weights; prints nothing.
"""

import json
from dataclasses import asdict, replace
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

from phi3v.data.check import (
    FetchedPart,
    Images,
    Report,
    count_reasons,
    crop_prices,
    length_spreads,
    listed,
    rows_beyond,
    told_of_budget,
)
from phi3v.data.duplicates import find_duplicates
from phi3v.data.fact_table import FactTable
from phi3v.data.fetch import FetchSummary, fetch_images
from phi3v.data.reading import Reading
from phi3v.errors import DataError
from phi3v.first_look import (
    FoundRows,
    Progress,
    Surveyed,
    find_refusal,
    find_rows,
    survey_data,
    survey_options,
)
from phi3v.image_tokens import crops_allowed
from phi3v.recipe import Recipe


def check_recipe(
    recipe: Recipe,
    *,
    model: bool = True,
    decode: bool = True,
    fetch: bool = False,
    shard: tuple[int, int] = (0, 1),
    on_progress: Progress | None = None,
) -> Report:
    """Looks at every row of a recipe's data.

    Args:
        recipe: whose data, limits and model.
        model: False counts no tokens: the recipe's model is only a stand-in.
        decode: decode every image; False is quicker and takes the header for enough.
        fetch: download images that are not in the cache.
        shard: (i, n) downloads the i-th of n parts, from 0, so that n machines share the work and one cache, and looks
            closely at its rows alone.
        on_progress: called as rows are looked at.
    Raises: DataError, CheckpointError: the set or the model's small files cannot be read at all.
    """
    name = recipe.model.name
    processor, config = _model_files(recipe) if model else (None, None)
    context = config.max_position_embeddings if config is not None else None
    limit = recipe.data.max_length if context is None else recipe.data.longest(context)
    whole, in_part = fetch and shard == (0, 1), fetch and shard != (0, 1)
    part = _fetch_part(recipe, shard, on_progress) if in_part else None
    failures = {} if part is None else part.failures
    data, unsplit = rows_or_trouble(recipe, download=whole, failures=failures, on_progress=on_progress)
    options = survey_options(recipe, context, decode=decode, hashes=True)
    options = replace(options, part=shard if in_part else None)
    train, held_out, problems = survey_data(data, processor, options, on_progress=on_progress)
    facts = FactTable(chain(train.facts, held_out.facts))
    allowed = crops_allowed(recipe.image.num_crops, recipe.image.max_tokens)
    crops = allowed if processor is None else processor.image_processor.num_crops
    rope_limit = config.original_max_position_embeddings if config is not None else None
    return Report(
        source=recipe.data.train_name,
        rows=data.rows_in,
        usable=data.rows_in - len(problems),
        train=len(train.kept),
        validation=len(held_out.kept),
        origin=data.origin,
        problems=listed(problems),
        reasons=count_reasons(problems),
        **_limits(recipe),
        trouble=data.refusal or unsplit or find_refusal(recipe, data, problems, train.kept),
        sampled=data.sampled,
        decoded=decode,
        images=Images.of(facts, data.not_cached),
        model=name if model else None,
        num_crops=crops,
        lengths=length_spreads(facts) if model else {},
        context=context,
        limit=limit,
        beyond_context=rows_beyond(facts, limit),
        on_too_long=recipe.data.on_too_long,
        rope_limit=rope_limit,
        beyond_rope=rows_beyond(facts, rope_limit),
        duplicates=find_duplicates(train.facts, held_out.facts),
        crops=crop_prices(facts, num_crops=crops, max_tokens=recipe.image.max_tokens, context=limit),
        crops_told=told_of_budget(recipe.image.num_crops, recipe.image.max_tokens),
        sets=data.sets,
        not_read=data.not_read,
        part=None if not in_part else FetchedPart.of(shard, part, **_limits(recipe)),
        outlook=_outlook(recipe, train, config, crops) if model else None,
    )


def _model_files(recipe: Recipe) -> tuple[Any, Any]:
    """Processor and config of the recipe's model; without a model, transformers is not imported."""
    from phi3v.loading import load_config, load_processor

    name, revision = recipe.model.name, recipe.model.revision
    options = recipe.image.processor_options
    return load_processor(name, revision=revision, **options), load_config(name, revision=revision)


def rows_or_trouble(recipe: Recipe, **options: Any) -> tuple[FoundRows, str | None]:
    """The rows as `find_rows` finds them, and why they cannot be split, when that is what is wrong with them."""
    try:
        return find_rows(recipe, **options), None
    except DataError as error:
        if recipe.data.split is None:
            raise
        return find_rows(recipe.with_overrides(["data.split=null"]), **options), str(error)


def _fetch_part(recipe: Recipe, shard: tuple[int, int], on_progress: Progress | None) -> FetchSummary | None:
    """Downloads what is not in the cache of one part of the images; None where no row has a web address.

    All addresses of the part are asked for, as of an empty cache, so that those that came before count: a part that is
    started again is judged as the one that was not killed.
    """
    reading = Reading.of(**recipe.data.reading_options)
    with TemporaryDirectory() as empty:
        uncached = recipe.with_overrides([f"data.image_cache={json.dumps(empty)}"])
        urls = rows_or_trouble(uncached, download=False)[0].not_cached
    if not urls or reading.cache is None:
        return None
    told = None if on_progress is None else lambda done, total: on_progress("downloading images", done, total)
    return fetch_images(urls, reading.cache, reading.limits, shard=shard, on_progress=told)


def _limits(recipe: Recipe) -> dict[str, Any]:
    """How much may be missing."""
    return {"max_skipped": recipe.data.max_skipped, "on_problem": recipe.data.on_problem}


def _outlook(recipe: Recipe, train: Surveyed, config: Any, num_crops: int | None) -> dict[str, Any]:
    """Steps and time of the run as plain values."""
    from phi3v.training.outlook import outlook

    return asdict(outlook(recipe, len(train.kept), train.facts, config, num_crops))
