"""The recipe: one YAML file that says everything about one run.

In come YAML text and `key=value` overrides; out comes a frozen `Recipe` whose sections map one to one to what does the
work. `lora`, `quantization` and the free part of `training` are handed to peft.LoraConfig, to
transformers.BitsAndBytesConfig and to transformers.TrainingArguments as they stand: their fields are not restated here,
and those libraries check them later. Relative paths in a recipe count from the directory in which the command is
started; `output` of a recipe.yaml that lies in a run's folder is that folder, wherever it was moved. Knows nothing of
torch or transformers; every mistake is a `ConfigError` of one line that names the dotted key.
"""

import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from phi3v.errors import ConfigError
from phi3v.recipe_data import DataSection, Section, shorthand, tightens
from phi3v.recipe_errors import explain
from phi3v.recipe_image import ImageSection
from phi3v.recipe_places import PLACES, is_there, map_places, meant
from phi3v.recipe_report import EvaluationSection, ReportSection
from phi3v.recipe_sweep import SweepSection
from phi3v.recipe_vision import VisionSection
from phi3v.recipe_yaml import apply_override, read_yaml, write_yaml

LORA_DEFAULTS: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
"""What `lora` holds where a recipe says nothing: the guide's sizes on the decoder's real projections."""

FOUR_BITS: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
"""`quantization` of QLoRA, which `quantization: auto` takes where it is needed."""

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""TrainingArguments' two names for computing activations twice."""

COMPUTED_TRAINING_KEYS: dict[str, str] = {
    "per_device_train_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.samples_per_step",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "num_train_epochs": "training.epochs",
    "data_seed": "training.seed",
    "output_dir": "output",
    "report_to": "report.to",
    "run_name": "report.run_name",
    "project": "report.project",
}
"""TrainingArguments' fields that follow from another key of the recipe -> that key."""

RUN_FILES = ("recipe.yaml", "versions.json")
"""The files that make a folder a run."""

SETTINGS = tuple(
    "evaluation report sweep model.device data.image_cache data.allow_hosts data.max_skipped data.on_problem "
    "vision.cache_gb vision.cache_folder training.fast_lora training.non_finite training.fsdp training.fsdp_config "
    "training.ddp_backend training.ddp_timeout training.dataloader_num_workers training.save_total_limit".split()
)
"""Sections and keys that do not change what is trained: where and how fast it happens, and what is done afterwards.

What of `evaluation` a score follows from that judges a run is compared in `training.conditions`, and what `tightens` is
refused of a begun run."""


def _fill_lora(value: Any) -> Any:
    """`lora` with the defaults of the keys that are not given; null stays null."""
    return {**deepcopy(LORA_DEFAULTS), **value} if isinstance(value, dict) else value


def _fill_quantization(value: Any) -> Any:
    """`auto` as a mapping in which 4-bit is still to be chosen."""
    return {**FOUR_BITS, "load_in_4bit": "auto"} if value == "auto" else value


class ModelSection(Section):
    """Which weights are tuned, and where they are put."""

    name: str = Field(min_length=1, description="Hub id or folder of the model in Microsoft's layout.")
    revision: str | None = Field(default=None, description="Commit, tag or branch on the hub; null for the newest.")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        default="auto",
        description="Number type of weights; auto: bfloat16 on GPUs that have it, else float16; float32 on the CPU.",
    )
    adapter: str | None = Field(
        default=None, min_length=1, description="Run or adapter to go on from; its options take the place of lora."
    )
    attn_implementation: str | None = Field(
        default=None, description="Attention of transformers (sdpa, eager, ...); null takes sdpa."
    )
    device: str = Field(default="auto", description="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")


class TrainingSection(BaseModel):
    """How long and in which steps; all other keys (`options`) go to transformers.TrainingArguments."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    samples_per_step: int = Field(
        default=16,
        ge=1,
        description="Samples in one optimiser step, on all devices together; an epoch's last step is filled up with "
        "rows of that epoch.",
    )
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default=1, description="Samples that go through the model at once: memory, not the result; auto: what fits."
    )
    packing: bool = Field(
        default=True, description="Samples of a step end to end in rows, each attending to itself alone; false pads."
    )
    tokens_per_micro_batch: int | None = Field(
        default=None, ge=1, description="Most tokens of a pack; null: micro_batch_size times the longest sample."
    )
    epochs: float = Field(
        default=3.0, gt=0, allow_inf_nan=False, description="Passes over the training rows; max_steps wins."
    )
    max_steps: int | None = Field(default=None, ge=1, description="Stop after so many steps; null to go by epochs.")
    seed: int = Field(default=0, ge=0, description="Order of the samples, dropout and fresh adapter weights.")
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    fast_lora: Literal["auto", "off"] = Field(default="auto", description="auto: hand-written LoRA layers on GPUs.")
    non_finite: Literal["stop", "skip"] = Field(
        default="stop", description="A step whose loss or gradient is no number: stop, or leave it out."
    )
    early_stopping: int | None = Field(
        default=None, ge=1, description="Validations without a better score that end a run; its best weights are kept."
    )
    compile_layers: Literal["auto"] | bool = Field(
        default="auto", description="torch.compile for each layer; auto: GPUs."
    )

    @property
    def options(self) -> dict[str, Any]:
        """What goes to TrainingArguments as it is: learning_rate and all keys that are not fields of this section."""
        return {"learning_rate": self.learning_rate, **(self.model_extra or {})}

    @property
    def micro_batch(self) -> int:
        """Samples of a micro-batch; 1 for as long as `auto` is not chosen."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuses keys that follow from others, and steps that are not whole micro batches."""
        for key in self.model_extra or {}:
            if key in COMPUTED_TRAINING_KEYS:
                raise ValueError(f"training.{key} is computed; set {COMPUTED_TRAINING_KEYS[key]} instead")
        if self.samples_per_step % self.micro_batch:
            raise ValueError(
                f"training.samples_per_step is {self.samples_per_step}, which is no multiple of "
                f"training.micro_batch_size, {self.micro_batch_size}; change one of them"
            )
        if self.tokens_per_micro_batch is not None and not self.packing:
            raise ValueError(
                "training.tokens_per_micro_batch is the budget of packs, and training.packing is false: take one of "
                "them out"
            )
        return self


class Recipe(Section):
    """Everything about one run, read only.

    Example: Recipe.from_dict({"model": "some/name", "data": "rows.csv"}, name="shop").output -> "runs/shop".
    """

    model: Annotated[ModelSection, shorthand("name")] = Field(description="Which weights.")
    data: Annotated[DataSection, shorthand("train")] = Field(description="Which rows.")
    image: ImageSection = Field(default=ImageSection(), description="How images are seen.")
    vision: VisionSection = Field(default=VisionSection(), description="What happens to tower and projector.")
    lora: Annotated[dict[str, Any] | None, BeforeValidator(_fill_lora)] = Field(
        default=LORA_DEFAULTS,
        description="peft.LoraConfig, for the language model; null tunes all of it.",
        validate_default=True,
    )
    quantization: Annotated[dict[str, Any] | None, BeforeValidator(_fill_quantization)] = Field(
        default=None, description="transformers.BitsAndBytesConfig; null for none; auto: 4-bit where needed."
    )
    training: TrainingSection = Field(default=TrainingSection(), description="How long and in which steps.")
    evaluation: EvaluationSection = Field(default=EvaluationSection(), description="How answers are scored.")
    report: ReportSection = Field(default=ReportSection(), description="Who is told.")
    sweep: SweepSection | None = Field(default=None, description="What phi3v sweep tries.")
    output: str = Field(min_length=1, description="Folder of the run; runs/<recipe name> where nothing is said.")

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        """Refuses LoRA where there is none."""
        for key, wanted in (
            ("vision.tower", self.vision.tower == "lora"),
            ("vision.projector", self.vision.projector == "lora"),
            ("model.adapter", self.model.adapter is not None),
        ):
            if wanted and self.lora is None:
                raise ValueError(f"{key} asks for LoRA, and lora is null: take one of them out")
        for name in ("tower", "projector"):
            if getattr(self.vision, name) == "frozen" and getattr(self.vision, f"{name}_learning_rate") is not None:
                raise ValueError(
                    f"vision.{name}_learning_rate is set, and vision.{name} is frozen: take one of them out"
                )
        return self

    @model_validator(mode="after")
    def _check_augmented(self) -> Self:
        """Refuses what cannot be had of images that are others each time."""
        if not self.image.augments:
            return self
        if self.vision.cache is not None:
            raise ValueError("vision.cache keeps what images look like, and image.augment changes them: take one out")
        if self.data.streaming:
            raise ValueError("image.augment needs rows that are counted, which a stream has not: take one of both out")
        return self

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        """Refuses what a stream, which has no end, cannot give; all of it in one line."""
        if not self.data.streaming:
            return self
        found: list[str] = []
        if self.training.max_steps is None:
            found.append("data.streaming needs training.max_steps: a stream has no end, so no epochs")
        if self.vision.cache is not None:
            found.append("vision.cache keeps all rows, and data.streaming is for sets too large for that")
        if self.data.max_rows is not None:
            found.append("data.max_rows is for sets that are read whole: a stream is stopped by training.max_steps")
        split = self.data.split
        if self.data.validation is None and split is not None and not isinstance(split.validation, int):
            found.append(
                "data.split.validation is a share, and a stream has no end to count from: with data.streaming give a "
                "number of rows, data.validation, or data.split: null"
            )
        if found:
            raise ValueError("; ".join(found))
        return self

    @property
    def automatic(self) -> list[str]:
        """The dotted keys whose values are still to be chosen: ["training.micro_batch_size", "quantization"]."""
        found = ["training.micro_batch_size"] if self.training.micro_batch_size == "auto" else []
        found += [f"training.{name}" for name in CHECKPOINTING if self.training.options.get(name) == "auto"]
        return found + (["quantization"] if (self.quantization or {}).get("load_in_4bit") == "auto" else [])

    @property
    def loading_options(self) -> dict[str, Any]:
        """The arguments of loading.load_target by name: how images are seen, dtype, device, attention, 4-bit."""
        return {
            **self.image.processor_options,
            "dtype": self.model.dtype,
            "device": self.model.device,
            "attn_implementation": self.model.attn_implementation,
            "quantization": self.quantization,
        }

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = (), name: str | None = None) -> Self:
        """Reads a recipe file.

        Args:
            path: the YAML file. Relative paths inside it count from the current directory, not from the file.
            overrides: texts like "training.learning_rate=1e-4", applied in order; values are YAML.
            name: as in `from_dict`; the file's own where None.
        Raises: ConfigError in one line for a file that is missing or not YAML, and for unknown keys and wrong values.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"recipe {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"recipe {path} cannot be read: {reason}; give the path of a YAML recipe") from error
        values, overrides = read_yaml(text, f"recipe {path}"), list(overrides)
        beside = (path.parent / name for name in (RUN_FILES[1], "metrics.jsonl"))  # also in a run that lost one
        if isinstance(values, Mapping) and path.name == RUN_FILES[0] and any(file.is_file() for file in beside):
            values = {**values, "output": os.path.abspath(path.parent)}
        if values is None:
            raise ConfigError(f"recipe {path} is empty; write at least model, data.train and the templates into it")
        try:
            return cls.from_dict(values, overrides, name=name or path.stem)
        except ConfigError as error:
            raise ConfigError(cls._blame(str(error), path, values, overrides)) from error

    @classmethod
    def _blame(cls, line: str, path: Path, values: Any, overrides: list[str]) -> str:
        """A mistake with where it is: in an override, or in the file where it is one without them too."""
        if line.startswith("override "):
            return line
        try:
            cls.from_dict(values)
        except ConfigError as error:
            overrides = [] if str(error) == line else overrides
        for parts in (None, 1):  # the whole key, then its section alone: trainin.seed=1 -> "unknown key trainin"
            for override in overrides:
                if ".".join(override.partition("=")[0].strip().split(".")[:parts]) in line:
                    return f"override {override!r}: {line}"
        return f"recipe {path}: {line}"

    @classmethod
    def from_dict(cls, values: Any, overrides: Iterable[str] = (), name: str = "run") -> Self:
        """A recipe from plain values, as `load` finds them in a file.

        Args:
            values: mapping of the sections.
            overrides: as in `load`.
            name: names the output folder, runs/<name>, where `output` is not given.
        Raises: ConfigError in one line.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"a recipe is a mapping of sections ({', '.join(cls.model_fields)}), given {values!r}"[:300]
            )
        values = {"output": f"runs/{name}", **values}
        for override in overrides:
            values = apply_override(values, override, _SHORTHANDS)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from error

    def with_overrides(self, overrides: Iterable[str]) -> Self:
        """This recipe with some values replaced; `overrides` as in `load`."""
        return type(self).from_dict(self.model_dump(), overrides)

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that `load` reads back to an equal recipe."""
        return write_yaml(self.model_dump())

    def with_places(self) -> Self:
        """This recipe with absolute paths for `output` and for what is here, so that it can be read from any folder.

        Hub ids and what does not exist stay. Example: in /home/me, which holds rows.csv, {"model": "some/name",
        "data": "rows.csv"} gives data.train "/home/me/rows.csv" and the model as it is.
        """
        values = self.model_dump()
        for section, key in PLACES:
            values[section][key] = map_places(
                key, values[section][key], os.path.isdir if section == "model" else is_there
            )
        return type(self).from_dict({**values, "output": os.path.abspath(self.output)})

    def with_settings(self, other: "Recipe") -> Self:
        """This recipe with the values that another has for the keys of `SETTINGS`."""
        values, given = self.model_dump(), other.with_places().model_dump()
        for section, _, key in (name.partition(".") for name in SETTINGS):
            if key:
                values[section] = {name: value for name, value in values[section].items() if name != key}
                values[section] |= {name: value for name, value in given[section].items() if name == key}
            else:
                values[section] = given[section]
        return type(self).from_dict(values)

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key, {"training.seed": 0, ...}."""
        return _flatten(self.model_dump())

    def differences(self, other: "Recipe", *, settings: bool = True) -> list[str]:
        """The dotted keys whose values differ, `output` aside (a run may be moved); without `SETTINGS` when False.

        A relative path is equal to the absolute one that it stands for here.
        Example: ["training.seed: 1 here, 2 there", "training.optim: not set here, 'sgd' there"].
        """
        mine, theirs = self.flat(), other.flat()
        changed = [key for key in {**mine, **theirs} if meant(key, mine) != meant(key, theirs)]
        return [
            f"{key}: {_told(key, mine, theirs)} here, {_told(key, theirs, mine)} there"
            for key in changed
            if key != "output"
            and (settings or not _is_setting(key) or tightens(key, now=mine.get(key), before=theirs.get(key)))
        ]


def _is_setting(key: str) -> bool:
    """Whether a key is one of `SETTINGS`, or lies in one."""
    return any(f"{key}.".startswith(f"{name}.") for name in SETTINGS)


def _told(key: str, values: dict[str, Any], others: dict[str, Any]) -> str:
    """A value as a refusal names it; null is told from a key that is not there only where the other has neither."""
    if values.get(key) is not None:
        return repr(values[key])
    return "null" if key in values and others.get(key) is None else "not set"


_SHORTHANDS = {"model": "name", "data": "train"}


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else key))
    return flat
