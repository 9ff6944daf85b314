"""From a recipe's `training` section to transformers' TrainingArguments.

What follows from other sections (batch sizes, folders, precision, device) is computed here; every other key is handed
through by its own name, after a check that TrainingArguments has it. Nothing is restated.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from phi3v.errors import ConfigError
from phi3v.passthrough import check_names, first_line
from phi3v.recipe import CHECKPOINTING, COMPUTED_TRAINING_KEYS, Recipe, TrainingSection
from phi3v.run_folder import RunFolder
from phi3v.training.checkpointing import CHECKPOINTING_KWARGS, check_checkpointing
from phi3v.training.sample_answers import scored_by

_DECIDED_ELSEWHERE = {
    "bf16": "model.dtype",
    "fp16": "model.dtype (float16 scales losses, and gradients of weights in bfloat16 cannot be scaled back)",
    "use_cpu": "model.device",
    "dataloader_drop_last": "training.samples_per_step (the last step of an epoch is filled up)",
    # torch draws the seed of workers that live on once only, and a resumed run would draw it in another epoch.
    "dataloader_persistent_workers": "the run (workers begin anew in each epoch, so a run that goes on draws alike)",
    "auto_find_batch_size": "training.micro_batch_size (a step keeps its number of samples)",
    "resume_from_checkpoint": "output (a run goes on by itself)",
    "save_only_model": "output (a run goes on from its checkpoints, and needs all of them)",
    "ignore_data_skip": "data.streaming (a run goes on with the samples that were to come)",
    "enable_jit_checkpoint": "what happens at SIGTERM (the last whole step is saved, see docs/training.md)",
    "train_sampling_strategy": "training.seed (each epoch has every row in an order of its own)",
    "average_tokens_across_devices": "training.samples_per_step (a loss is the mean over its tokens, on all ranks)",
    "local_rank": "torchrun or accelerate launch",
    "deepspeed": "training.fsdp (PyTorch's own way to shard a model)",
    "parallelism_config": "torchrun's number of ranks (each has samples of its own; see training.fsdp)",
    "device_map": "torchrun, a process for each GPU (one process that spreads a model uses one GPU at a time)",
    "hub_token": "HF_TOKEN or `hf auth login` (a recipe lies in the run's folder, in its report and at trackers)",
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "length_column_name": "training.packing (lengths are known from image headers and texts)",
}
_NOT_SHARDED = {"version": 1, "cpu_ram_efficient_loading": True}
_CHOICES = {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}
_BETWEEN = {
    "adam_beta1": (0, 1, "0 or more, below 1"),
    "adam_beta2": (0, 1, "0 or more, below 1"),
    "adam_epsilon": (5e-324, math.inf, "above 0"),
    "weight_decay": (0, math.inf, "0 or more"),
    "neftune_noise_alpha": (0, math.inf, "0 or more"),
    "max_grad_norm": (0, math.inf, "0 or more (0 clips nothing)"),
    "label_smoothing_factor": (0, 1, "0 or more, below 1"),
    "save_steps": (5e-324, math.inf, "above 0 (below 1 it is a part of the run): with 0 a kill loses all"),
    "logging_steps": (5e-324, math.inf, "above 0 (below 1 it is a part of the run)"),
    "save_total_limit": (1, math.inf, "1 or more (null keeps all checkpoints): a run goes on from its newest"),
}
"""What an option is at least, what it has to be below, and both in words; beyond it the first update makes weights that
are no numbers, or nothing is saved before the end."""
SHARDED_OPTIMISERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Optimisers that were seen to step weights which FSDP2 has cut; bitsandbytes' and adafactor fail in the first step."""
_FLAG = re.compile(r"--(?=[a-z])")  # how transformers writes an option, as if it came from a command line
_FIXED = {"remove_unused_columns", "label_names", "prediction_loss_only", "disable_tqdm", "do_train", "do_eval"}


def training_arguments(
    recipe: Recipe,
    run: RunFolder,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    validated: bool,
    ranks: int = 1,
) -> TrainingArguments:
    """TrainingArguments of a run.

    Args:
        recipe: the recipe; `training` is read, and what steps and evaluations need from other sections.
        run: its folder; checkpoints go there.
        device: cpu or cuda.
        autocast: dtype of mixed precision, None to compute in the weights' own.
        validated: whether there are validation rows.
        ranks: processes that share each step.

    Raises:
        ConfigError: an option that TrainingArguments does not have, that is decided elsewhere, or that it refuses.
    """
    training = recipe.training
    check_options(training.options)
    options = _today(deepcopy(training.options))  # TrainingArguments fills up what it is given
    _check_best(recipe, validated)
    transfer = {"non_blocking": device.type == "cuda"}  # from pinned memory, while the device computes
    transfer |= {"dispatch_batches": False} if recipe.data.streaming else {}
    defaults: dict[str, Any] = {
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "steps" if "save_steps" in options else "epoch",
        "save_total_limit": 2,
        "eval_strategy": ("steps" if "eval_steps" in options else "epoch") if validated else "no",
        **({"load_best_model_at_end": True} if training.early_stopping is not None else {}),
        **(_of_streams(training.max_steps or 1, validated) if recipe.data.streaming else {}),
        # re-entrant checkpointing below a frozen embedding gives no gradient at all
        **_today({"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    }
    computed: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "per_device_train_batch_size": training.samples_per_step // ranks,  # a step is one item of the loader
        "gradient_accumulation_steps": 1,
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
        "accelerator_config": _with_transfer(options.get("accelerator_config"), transfer),
        "use_liger_kernel": False,  # transformers knows no kernels for phi3_v, see `liger`
    }
    _check_strategies(training.early_stopping, {**defaults, **options})
    with library_errors():
        arguments = TrainingArguments(**{**defaults, **options, **computed})
    _check_schedule(arguments)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would be torch's DataParallel
    return arguments


def _with_transfer(given: Any, transfer: dict[str, bool]) -> Any:
    """accelerate's configuration with ours where a recipe's mapping says nothing; a file's name stays."""
    return given if isinstance(given, str) else {**transfer, **(given or {})}


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
    }


def _today(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the name that this transformers prefers for checkpointing, so that it does not warn; null for its
    arguments leaves them to us.

    Example: {"gradient_checkpointing": True} -> {"activation_checkpointing": True} where that field exists.
    """
    known = {field.name for field in fields(TrainingArguments)}
    options = {name: value for name, value in options.items() if value is not None or name not in CHECKPOINTING_KWARGS}
    options = {name: value for name, value in options.items() if name not in CHECKPOINTING or value != "auto"}
    renamed = {name: name.replace("gradient_checkpointing", "activation_checkpointing") for name in options}
    return {renamed[name] if renamed[name] in known else name: value for name, value in options.items()}


def check_options(options: dict[str, Any]) -> None:
    """Refuses keys that are misspelt or decided in another place of the recipe."""
    for name in options:
        if name in _DECIDED_ELSEWHERE:
            raise ConfigError(f"training.{name} is decided by {_DECIDED_ELSEWHERE[name]}: take it out of the recipe")
        if name in _FIXED:
            raise ConfigError(f"training.{name} cannot be chosen: take it out of the recipe")
    taken = {*COMPUTED_TRAINING_KEYS, *_DECIDED_ELSEWHERE, *_FIXED}  # are not offered
    known = [field.name for field in fields(TrainingArguments) if field.name not in taken]
    elsewhere = {name: f"model.{name}" for name in ("device", "dtype", "attn_implementation", "adapter", "revision")}
    check_names(
        "training", options, known, near_by={**elsewhere, **{name: name for name in TrainingSection.model_fields}}
    )
    for name, value in options.items():
        if name in _CHOICES:
            _check_choice(name, value)
        if name in (*CHECKPOINTING_KWARGS, "fsdp_config") and value is not None and not isinstance(value, dict):
            raise ConfigError(f"training.{name} is {value!r}, allowed is a mapping, or null for our own")
    check_checkpointing(options)
    for name, value in _NOT_SHARDED.items():
        if (options.get("fsdp_config") or {}).get(name) == value:
            raise ConfigError(
                f"training.fsdp_config.{name} is {value!r}: ranks share a model by FSDP2, and each looks at all of its "
                "weights first; take it out"
            )
    for option in fields(TrainingArguments):
        if option.name in options:
            _check_plain(option.name, options[option.name], option.default)
            _check_whole(option.name, options[option.name], option.type)
    for name in _BETWEEN:
        if options.get(name) is not None:
            _check_between(name, options[name])
    optimiser = options.get("optim", SHARDED_OPTIMISERS[0])
    if options.get("fsdp") and optimiser not in SHARDED_OPTIMISERS:
        raise ConfigError(
            f"training.optim is {optimiser!r}, which cannot step a model that is sharded: with training.fsdp set one "
            f"of {', '.join(SHARDED_OPTIMISERS)}, or take fsdp out, as each rank has a whole model then"
        )


def _check_best(recipe: Recipe, validated: bool) -> None:
    """Refuses a choice of the best weights by what no validation of this run gives."""
    options = recipe.training.options
    metric = options.get("metric_for_best_model")
    wishes = {
        "early_stopping": recipe.training.early_stopping,
        "load_best_model_at_end": options.get("load_best_model_at_end"),
        "metric_for_best_model": metric,
        "save_strategy: best": options.get("save_strategy") == "best",
    }
    if not validated and any(wishes.values()):
        name = next(name for name, wished in wishes.items() if wished)
        raise ConfigError(f"training.{name} needs held-out rows: set data.split or data.validation")
    score, scores = str(metric or "loss").removeprefix("eval_"), scored_by(recipe)
    if score not in ("loss", *scores):
        allowed = f"eval_loss and, with evaluation.during_training, {' and '.join(scores)}"
        raise ConfigError(f"training.metric_for_best_model is {metric!r}, allowed are {allowed}")
    if score in scores and not recipe.evaluation.during_training:
        raise ConfigError(
            f"training.metric_for_best_model is {metric!r}, a score of answers, and evaluation.during_training is 0: "
            "set that to a number of held-out rows, or take eval_loss"
        )


def _check_strategies(early_stopping: int | None, options: dict[str, Any]) -> None:
    """Refuses the best weights of a run that has no checkpoint at its validations, in the recipe's words: of the two
    strategies one may be a default that nobody set."""
    validated, saved = (str(options[name]) for name in ("eval_strategy", "save_strategy"))
    known = {validated, saved} <= {"no", "steps", "epoch"}  # `best` saves as it validates; others transformers refuses
    if options.get("load_best_model_at_end") is True and known and validated != saved:
        name = "load_best_model_at_end" if early_stopping is None else "early_stopping"
        raise ConfigError(
            f"training.{name} needs a checkpoint at each validation, and eval_strategy is {validated}, save_strategy "
            f"{saved}: set both to epoch, or both to steps and save_steps to a multiple of eval_steps"
        )


def _check_choice(name: str, value: Any) -> None:
    """Refuses a value that is none of an option's choices, with the nearest one."""
    known = [choice.value for choice in _CHOICES[name]]
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        hint = f": did you mean {near[0]}?" if near else f", {known[0]} for instance is"
        raise ConfigError(f"training.{name} is {value!r}, which is no choice{hint}")


def _check_plain(name: str, value: Any, default: Any) -> None:
    """Refuses words where an option is a number, and anything but true and false (or null) where it is one of them.

    transformers itself would find out in the middle of a training, or take "no" for true.
    """
    if name in CHECKPOINTING and value == "auto":
        return  # chosen before it is used
    if name == "dataloader_num_workers" and (type(value) is not int or value < 0):
        raise ConfigError(f"training.{name} is {value!r}, allowed is a whole number, 0 or more")
    if isinstance(default, bool):
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"training.{name} is {value!r}, allowed are true and false")
    elif isinstance(default, int | float) and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ConfigError(f"training.{name} is {value!r}, allowed is a number")


def _check_whole(name: str, value: Any, kind: Any) -> None:
    """Refuses a part of a number where an option counts: 1.5 would be compared with, and cut off, in mid-training."""
    if kind not in (int, int | None) or (value is None and kind is not int):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        least = f", {_BETWEEN[name][2]}" if name in _BETWEEN else ""
        raise ConfigError(f"training.{name} is {value!r}, allowed is a whole number{least}")


def _check_between(name: str, value: Any) -> None:
    """Refuses a number that no optimiser computes with."""
    least, beyond, words = _BETWEEN[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value < beyond:
        raise ConfigError(f"training.{name} is {value!r}, allowed is a finite number, {words}")


def _check_schedule(arguments: TrainingArguments) -> None:
    """Refuses a schedule whose arguments are wrong or missing."""
    kwargs = dict(arguments.lr_scheduler_kwargs or {})
    name = SchedulerType(arguments.lr_scheduler_type).value
    with library_errors(f"training.lr_scheduler_type={name} with lr_scheduler_kwargs={kwargs}"):
        idle = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=idle,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=kwargs,
        )


@contextlib.contextmanager
def library_errors(where: str = "training") -> Iterator[None]:
    """Turns what transformers says of options into one line that names the section, or the keys that it is about.

    Example: "--tf32 requires Ampere" -> "training.tf32 requires Ampere".
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        line = _FLAG.sub("training.", first_line(error))
        raise ConfigError(line if line.startswith("training.") else f"{where}: {line}") from error
