"""The recipe's section `sweep`: what `phi3v sweep` tries, how often, and how it chooses.

Plain values and their limits. `sampler` and `pruner` are Optuna's classes by name with their own options, which are not
restated here. A training reads nothing of this section.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from phi3v.recipe_data import Section
from phi3v.recipe_report import MetricName


class RangeSection(Section):
    """Numbers from `low` to `high`; whole ones where both are."""

    low: int | float = Field(description="Smallest value.")
    high: int | float = Field(description="Largest value.")
    log: bool = Field(default=False, description="true: a factor counts alike anywhere, for rates and sizes.")
    step: int | float | None = Field(default=None, gt=0, description="Only every so many; null for any.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuses what no number lies in."""
        if self.low > self.high:
            raise ValueError(f"sweep.search: low is {self.low}, above high, {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("sweep.search: log needs a low above 0 and no step")
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))


def _dotted(value: Any) -> Any:
    """`search` with dotted keys, however it is nested: {"lora": {"r": [8, 16]}} -> {"lora.r": [8, 16]}."""
    return dict(_leaves(value)) if isinstance(value, Mapping) else value


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and "low" not in inner and "high" not in inner:
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _named(value: Any) -> Any:
    """`TPESampler` -> {"name": "TPESampler"}."""
    return {"name": value} if isinstance(value, str) else value


Choices = Annotated[list[Any], Field(min_length=1)]
Named = Annotated[dict[str, Any], BeforeValidator(_named)]


class SweepSection(Section):
    """What is tried, and how it is chosen."""

    search: Annotated[dict[str, RangeSection | Choices] | None, BeforeValidator(_dotted)] = Field(
        default=None, description="Key of the recipe -> list of values, or low and high; null: see docs/tuning.md."
    )
    trials: int = Field(default=20, ge=1, description="Trials of the whole sweep, failed and pruned ones among them.")
    timeout: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Seconds after which a call begins no more trials."
    )
    metric: MetricName | Literal["eval_loss"] = Field(
        default="eval_loss", description="What is made best on held-out rows: eval_loss, or a metric of evaluation."
    )
    sampler: Named = Field(
        default={"name": "TPESampler"}, description="Optuna's sampler: its class, or a mapping of name and its options."
    )
    pruner: Named | None = Field(
        default={"name": "MedianPruner"}, description="Optuna's pruner, in the same form; null ends no trial early."
    )
    storage: str | None = Field(
        default=None, min_length=1, description="Database URL, or a journal file; null: SQLite in the sweep's folder."
    )
    workers: int = Field(default=1, ge=1, description="Processes on this machine that try at once.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuses what no trial can have, and classes without a name."""
        for key in self.search or {}:
            if key.split(".")[0] in ("output", "sweep", "report"):
                raise ValueError(f"sweep.search.{key} cannot be searched: it changes nothing of what is trained")
        if self.search == {}:
            raise ValueError("sweep.search is empty: name a key and its values, or null for the default space")
        for key, value in (("sampler", self.sampler), ("pruner", self.pruner)):
            if value is not None and not isinstance(value.get("name"), str):
                raise ValueError(f"sweep.{key} needs a name, Optuna's class: TPESampler, MedianPruner for instance")
        return self
