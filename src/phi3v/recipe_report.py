"""The recipe's sections `evaluation` and `report`: how answers are made and scored, and who is told about a run.

Plain values and their limits, which change nothing of what is trained, unless a score of answers judges it.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from phi3v.recipe_data import Section

MetricName = Literal[
    "exact_match",
    "similarity",
    "field_accuracy",
    "json_field_accuracy",
    "json_valid",
    "multiple_choice",
    "relaxed_accuracy",
    "anls",
    "rouge_l",
    "chrf",
]
"""Every metric of `evaluation.kinds`, by its name."""

CheckName = Literal["overlap", "form", "constant", "images", "forgetting"]
"""Every check of `evaluation.checks`, by its name."""


def _trackers(value: Any) -> Any:
    """`none` or null -> [], one name -> a list of it."""
    if value in (None, "none", ["none"]):
        return []
    return [value] if isinstance(value, str) else value


class EvaluationSection(Section):
    """How answers are made and scored."""

    rows: int | None = Field(default=None, ge=1, description="Validation rows to answer, the first ones; null for all.")
    against: Literal["base"] | None = Field(
        default="base", description="What answers beside the tuned model at the end of a training: base, or null."
    )
    batch_size: int = Field(default=8, ge=1, description="Rows that are answered at once.")
    max_new_tokens: int = Field(default=128, ge=1, description="Longest answer in tokens.")
    during_training: int = Field(
        default=0, ge=0, description="Held-out rows that are answered, shown and scored at each validation."
    )
    metrics: list[MetricName] | None = Field(
        default=None,
        description="Metrics, the most important one first; null for those of the answers' kind.",
    )
    numeric_fields: list[str] | None = Field(
        default=None, description="Answer columns scored as numbers; null finds them by their values."
    )
    checks: list[CheckName] | None = Field(
        default=None,
        description="Checks: overlap, form, constant, images, forgetting; null for the first four, and forgetting with "
        "keep.",
    )
    keep: str | None = Field(
        default=None,
        min_length=1,
        description="What the model should still do: rows with image, question and answer, or a recipe.",
    )


class ReportSection(Section):
    """Who is told about the run."""

    to: Annotated[list[Literal["wandb", "tensorboard"]], BeforeValidator(_trackers)] = Field(
        default=[], description="Trackers: none, wandb, tensorboard, or a list."
    )
    project: str | None = Field(default=None, description="Project name at W&B; null for its own default.")
    run_name: str | None = Field(
        default=None, description="Name of the run at the tracker; null for the output folder's name."
    )
    samples: int = Field(
        default=12, ge=0, description="Worst and best rows that report.html shows large; 0 for one without photos."
    )
