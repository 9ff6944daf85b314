"""From a recipe's `training` section to transformers' TrainingArguments.

What follows from other sections (batch sizes, folders, precision, device) is computed here; every other key is handed
through by its own name, after a check that TrainingArguments has it. Nothing is restated.
"""

from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from phi3v.errors import ConfigError
from phi3v.passthrough import check_names, first_line
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder

_DECIDED_ELSEWHERE = {
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "use_cpu": "model.device",
    "dataloader_drop_last": "training.samples_per_step (the last step of an epoch is filled up)",
    "resume_from_checkpoint": "output (a run goes on by itself)",
}
_FIXED = {"remove_unused_columns", "label_names", "prediction_loss_only", "disable_tqdm", "do_train", "do_eval"}


def training_arguments(
    recipe: Recipe, run: RunFolder, *, device: torch.device, autocast: torch.dtype | None, validated: bool
) -> TrainingArguments:
    """TrainingArguments of a run.

    Args:
        recipe: the recipe; `training` is read, and what steps and evaluations need from other sections.
        run: its folder; checkpoints go there.
        device: cpu or cuda.
        autocast: dtype of mixed precision, None to compute in the weights' own.
        validated: whether there are validation rows.

    Raises:
        ConfigError: an option that TrainingArguments does not have, that is decided elsewhere, or that it refuses.
    """
    training, options = recipe.training, _today(recipe.training.options)
    check_options(options)
    defaults: dict[str, Any] = {
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "steps" if "save_steps" in options else "epoch",
        "save_total_limit": 2,
        "eval_strategy": ("steps" if "eval_steps" in options else "epoch") if validated else "no",
        **(_of_streams(training.max_steps or 1, validated) if recipe.data.streaming else {}),
        # re-entrant checkpointing below a frozen embedding gives no gradient at all
        **_today({"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    }
    computed: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.samples_per_step // training.micro_batch_size,
        "per_device_eval_batch_size": recipe.evaluation.batch_size,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "seed": training.seed,
        "bf16": autocast == torch.bfloat16,
        "fp16": autocast == torch.float16,
        "use_cpu": device.type == "cpu",
        "report_to": "none",  # trackers are callbacks of ours, see `trackers`
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "logging_nan_inf_filter": False,  # it would log a NaN as 0.0
        "dataloader_pin_memory": device.type == "cuda",
    }
    try:
        arguments = TrainingArguments(**{**defaults, **options, **computed})
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"training: {first_line(error)}") from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would be torch's DataParallel
    return arguments


def _of_streams(steps: int, validated: bool) -> dict[str, Any]:
    """Defaults for an endless stream: there are no epochs to save after, and a resumed run skips for itself.

    Example: 200 steps -> saved and validated every 20.
    """
    tenth = max(1, steps // 10)
    return {
        "save_strategy": "steps",
        "save_steps": tenth,
        "eval_strategy": "steps" if validated else "no",
        "eval_steps": tenth,
        "ignore_data_skip": True,
        "accelerator_config": {"dispatch_batches": False},
    }


def _today(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the name that this transformers prefers for checkpointing, so that it does not warn.

    Example: {"gradient_checkpointing": True} -> {"activation_checkpointing": True} where that field exists.
    """
    known = {field.name for field in fields(TrainingArguments)}
    renamed = {name: name.replace("gradient_checkpointing", "activation_checkpointing") for name in options}
    return {renamed[name] if renamed[name] in known else name: value for name, value in options.items()}


def check_options(options: dict[str, Any]) -> None:
    """Refuses keys that are misspelt or decided in another place of the recipe."""
    for name in options:
        if name in _DECIDED_ELSEWHERE:
            raise ConfigError(f"training.{name} is decided by {_DECIDED_ELSEWHERE[name]}: take it out of the recipe")
        if name in _FIXED:
            raise ConfigError(f"training.{name} cannot be chosen: take it out of the recipe")
    check_names("training", options, [field.name for field in fields(TrainingArguments)])
