"""What a sweep tries: from `sweep.search` of a recipe to Optuna's distributions, and from their values to a recipe.

A choice that is no plain value (a list of modules, a mapping of keys that belong together) has its JSON text for a name
in Optuna's storage. Knows no trials and no folders.
"""

import json
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from phi3v.errors import ConfigError, Phi3VError
from phi3v.recipe import LORA_DEFAULTS, Recipe
from phi3v.recipe_sweep import RangeSection, SweepSection
from phi3v.training.preflight import check_recipe_alone

Dimension = RangeSection | list[Any]
Space = dict[str, Dimension]
"""Dotted key of the recipe -> its values."""


def search_space(recipe: Recipe) -> Space:
    """What the recipe searches, or the default space.

    Raises: ConfigError for a key none of whose values can be used.
    """
    sweep = recipe.sweep or SweepSection()
    if sweep.search is None:
        return default_space(recipe)
    for key, dimension in sweep.search.items():
        values = [dimension.low, dimension.high] if isinstance(dimension, RangeSection) else dimension
        problems = [problem for value in values if (problem := _problem(recipe, key, value)) is not None]
        if len(problems) == len(values):
            raise ConfigError(f"sweep.search.{key}: {problems[0]}")
    return dict(sweep.search)


def _problem(recipe: Recipe, key: str, value: Any) -> str | None:
    """Why a recipe cannot take a value; None where it can."""
    try:
        check_recipe_alone(with_values(recipe, {key: value}))
    except Phi3VError as error:
        return str(error)
    return None


def default_space(recipe: Recipe) -> Space:
    """Learning rate, samples of a step, rank, targets, epochs and crops, those of them that the recipe leaves open.

    Example: a recipe with `lora: null` has no rank and no targets to search, one with training.max_steps no epochs.
    """
    training = recipe.training
    space: Space = {"training.learning_rate": RangeSection(low=2e-5, high=2e-3, log=True)}
    samples = [count for count in (8, 16, 32) if count % training.micro_batch == 0]
    if len(samples) > 1:
        space["training.samples_per_step"] = samples
    if recipe.lora is not None and recipe.model.adapter is None:
        space["lora.r"] = [8, 16, 32, 64]
        space["lora.target_modules"] = [LORA_DEFAULTS["target_modules"], ["qkv_proj", "o_proj"]]
    if training.max_steps is None:
        space["training.epochs"] = [1, 2, 3]
    if recipe.image.num_crops is None and recipe.image.max_tokens is None:
        space["image.num_crops"] = [1, 4, 16]
    return space


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's form of a space, by key in the order of the recipe."""
    return {key: _distribution(dimension) for key, dimension in space.items()}


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, list):
        return CategoricalDistribution([label(value) for value in dimension])
    low, high, step = dimension.low, dimension.high, dimension.step
    if dimension.whole:
        return IntDistribution(int(low), int(high), log=dimension.log, step=int(step or 1))
    return FloatDistribution(low, high, log=dimension.log, step=step)


def label(value: Any) -> str | int | float | bool | None:
    """A choice as Optuna stores it: ["qkv_proj"] -> '["qkv_proj"]', 16 -> 16."""
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)


def values_of(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values of Optuna's.

    Example: {"lora.target_modules": '["qkv_proj"]'} -> {"lora.target_modules": ["qkv_proj"]}.
    """
    found = {}
    for key, value in params.items():
        dimension = space.get(key)
        choices = dimension if isinstance(dimension, list) else []
        found[key] = next(
            (choice for choice in choices if label(choice) == value and type(label(choice)) is type(value)), value
        )
    return found


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe with some values replaced, without its section `sweep`.

    Args:
        recipe: the sweep's.
        values: dotted key -> value; a mapping for a value sets the keys in it, whatever its own key is called.
    Example: {"size": {"lora.r": 8, "lora.lora_alpha": 16}, "training.seed": 1} sets three values.
    Raises: ConfigError for a combination that no recipe can have.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    return recipe.with_overrides(["sweep=null", *(f"{key}={json.dumps(value)}" for key, value in flat.items())])
