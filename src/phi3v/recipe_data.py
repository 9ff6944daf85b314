"""The recipe's section `data`: which rows, how they become questions and answers, and what may be left out.

Plain values and their limits; what they mean is the business of the package `data`, which receives them by name.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_serializer

Format = Literal["auto", "columns", "messages", "prompt_completion", "conversations"]
_ROW_KEYS = {"format", "images", "image_root", "allow_outside_root", "system", "prompt", "answer"}


class Section(BaseModel):
    """What all sections share: frozen, nothing unknown, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def shorthand(key: str) -> BeforeValidator:
    """Lets a section be written as one plain text: `model: some/name` for `model: {name: some/name}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _share_or_rows(value: Any) -> Any:
    """A share of the rows (a float between 0 and 1) or a number of rows (a positive int)."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value >= 1 if isinstance(value, int) else 0 < value < 1)
    ):
        raise ValueError(
            f"given {value!r}, allowed is a whole number of rows (1 or more) or a share between 0.0 and 1.0"
        )
    return value


class SplitSection(Section):
    """How validation rows are taken from `data.train` when there are no others."""

    validation: Annotated[int | float, BeforeValidator(_share_or_rows)] = Field(
        default=0.1,
        description="Validation rows: a share between 0.0 and 1.0, or a number of rows; with a share no row changes "
        "sides when others are added.",
    )
    seed: int = Field(default=0, ge=0, description="Another seed gives another choice of rows.")


class SetSection(Section):
    """One of several sets to train on; what is not given is taken from the section `data`."""

    source: str = Field(min_length=1, description="Folder, file, pattern of .tar shards, or hub id.")
    weight: float | None = Field(
        default=None, gt=0, le=1e9, allow_inf_nan=False, description="Its part of an epoch beside the others' weights."
    )
    revision: str | None = Field(default=None, description="Commit, tag or branch of a hub data set.")
    subset: str | None = Field(default=None, description="Configuration of a hub data set that has several.")
    format: Format = Field(default="auto", description="As data.format.")
    images: str | None = Field(default="image", description="As data.images.")
    image_root: str | None = Field(default=None, description="As data.image_root.")
    allow_outside_root: bool = Field(default=False, description="As data.allow_outside_root.")
    system: str | None = Field(default=None, description="As data.system.")
    prompt: Annotated[str, Field(min_length=1)] | None = Field(
        default="{prompt}", description="As data.prompt; null for none of the section's."
    )
    answer: Annotated[str, Field(min_length=1)] | None = Field(
        default="{answer}", description="As data.answer; null for none of the section's."
    )

    @model_serializer
    def _given(self) -> dict[str, Any]:
        """The keys that were given: what a set does not say stays open."""
        return {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set}


def _one_or_several(value: Any) -> str:
    """Which form of `data.train` a value is meant to be; the tags stand in brackets so that errors can drop them."""
    return "(several)" if isinstance(value, list) else "(one)"


class DataSection(Section):
    """Where rows come from and how a row becomes a question and an answer."""

    train: Annotated[
        Annotated[str, Field(min_length=1), Tag("(one)")]
        | Annotated[list[Annotated[SetSection, shorthand("source")]], Field(min_length=1), Tag("(several)")],
        Discriminator(_one_or_several),
    ] = Field(
        description="Folder, CSV, JSON, JSONL, Parquet or .tar file, or hub id of the rows to train on; or a list."
    )
    validation: str | None = Field(
        default=None, description="The same for validation; null takes the set's own split, else `split`."
    )
    revision: str | None = Field(default=None, description="Commit, tag or branch of a hub data set.")
    subset: str | None = Field(default=None, description="Configuration of a hub data set that has several.")
    split: SplitSection | None = Field(
        default=SplitSection(), description="Used where there is only train; null for no validation."
    )
    format: Format = Field(default="auto", description="Shape of the records; auto decides by their columns.")
    images: str | None = Field(
        default="image", description="Column with the image or a list of images; null for text only."
    )
    image_root: str | None = Field(
        default=None, description="Folder that image paths count from; null for the data file's own folder."
    )
    allow_outside_root: bool = Field(default=False, description="true lets image paths leave that folder.")
    allow_hosts: list[str] = Field(
        default=[], description="Hosts that images may be downloaded from although they are not public."
    )
    image_cache: str | None = Field(
        default=None, description="Folder of downloaded images; null for phi3v/images in the user's cache folder."
    )
    system: str | None = Field(default=None, description="Template of the system message; null for none.")
    prompt: str = Field(default="{prompt}", min_length=1, description="Template of the question; {column} is replaced.")
    answer: str = Field(default="{answer}", min_length=1, description="Template of the answer; {column} is replaced.")
    train_on: Literal["last_assistant", "all_assistant"] = Field(
        default="last_assistant", description="Which answers of a conversation are trained."
    )
    max_rows: int | None = Field(default=None, ge=1, description="Train on the first rows only; null for all.")
    max_length: int | None = Field(
        default=None, ge=1, description="Longest row in tokens, images included; the model's limit at most."
    )
    on_too_long: Literal["skip", "fewer_crops", "cut_text"] = Field(
        default="skip", description="What happens to a longer row: left out, coarser images, or a shorter question."
    )
    max_skipped: float = Field(
        default=0.05, ge=0, le=1, description="Share of a set's rows that may be left out; more stops the run."
    )
    on_problem: Literal["skip", "stop"] = Field(
        default="skip", description="A row that cannot be used: leave it out, or stop."
    )
    streaming: bool = Field(
        default=False, description="true reads rows as they come: for sets larger than the disk; needs max_steps."
    )

    @property
    def row_options(self) -> dict[str, Any]:
        """The arguments of data.RowOptions by name, `max_pixels` aside, which is in the section `image`."""
        return self.model_dump(include=_ROW_KEYS)

    @property
    def load_options(self) -> dict[str, Any]:
        """The arguments of data.load_data by name, `options` and `reading` aside."""
        return {
            **self.model_dump(include={"train", "validation", "revision", "subset", "max_rows"}),
            "validation_split": self.split.validation if self.split else None,
            "split_seed": self.split.seed if self.split else 0,
        }

    @property
    def encode_options(self) -> dict[str, Any]:
        """The arguments of data.encode by name, limits that other sections decide aside."""
        return self.model_dump(include={"train_on", "on_too_long"})

    @property
    def reading_options(self) -> dict[str, Any]:
        """The arguments of data.Reading.of by name."""
        return self.model_dump(include={"image_cache", "allow_hosts", "max_skipped", "on_problem"})

    def longest(self, context: int) -> int:
        """Tokens of the longest row that is allowed, of a model that takes `context` tokens.

        Example: with 8,192 -> 8192 where max_length is null or 100,000, and 330 where it is 330.
        """
        return min(self.max_length or context, context)

    @property
    def train_name(self) -> str:
        """What the rows to train on are called: "shop.csv", or "shop.csv, owner/name" for several."""
        return self.train if isinstance(self.train, str) else ", ".join(one.source for one in self.train)


def tightens(key: str, *, now: Any, before: Any) -> bool:
    """Whether a value allows fewer rows to be left out than one before, which a begun run may have used up by now.

    Example: "data.max_skipped" 0.05 after 0.5 -> True; 0.5 after 0.05 -> False, and so for every other key.
    """
    if key == "data.max_skipped":
        return bool(now < before)
    return key == "data.on_problem" and now == "stop" and before == "skip"
