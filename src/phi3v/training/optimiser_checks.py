"""What is wrong with an optimiser or a schedule, seen in one update of a few numbers before a training is made.

In come TrainingArguments and what they are for; out comes nothing, or a `ConfigError` of one line. Which numbers an
optimiser may have is not restated: one of its own class steps a tiny weight, and what comes out is looked at.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from phi3v.errors import ConfigError
from phi3v.recipe import Recipe
from phi3v.training.arguments import library_errors

_log = logging.getLogger(__name__)
_OWN_WEIGHTS = {"params", "model", "optimizer_dict"}
"""Arguments of optimisers that take the model's own weights, and are not tried on others."""
_LITTLE = 0.1
"""The share of the learning rate that some step of a run should have: with a warm-up longer than itself it has none."""


def check_optimiser(arguments: TrainingArguments, model: Any, recipe: Recipe, rows: Any) -> None:
    """Refuses what cannot be made, makes weights that are no numbers, or moves none; warns where a run hardly trains.

    Args:
        arguments: what `training_arguments` gave.
        model: what trains; some optimisers look at it.
        recipe: the learning rates of parts, and the length of the run.
        rows: training rows; those of a stream have no length.

    Raises:
        ConfigError: a package is not installed, an argument is wrong or unknown, or the learning rate is always 0.
    """
    name = OptimizerNames(arguments.optim).value
    with library_errors(f"training.optim={name}"):
        made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    rates = {"training.learning_rate": arguments.learning_rate}
    rates |= {f"the learning rate of the {part}": rate for part, rate in recipe.vision.learning_rates.items()}
    if isinstance(made, type) and issubclass(made, torch.optim.Optimizer) and not _OWN_WEIGHTS & options.keys():
        _refuse_idle_names(arguments, model, options)
        for where, rate in rates.items():
            _try_update(f"{where} {rate:g} with training.optim={name}", made, options, rate, arguments)
    steps = recipe.training.max_steps
    if steps is None and hasattr(rows, "__len__"):
        steps = int(-(-(-(-len(rows) // recipe.training.samples_per_step) * recipe.training.epochs) // 1))
    highest = _highest_rate(arguments, steps := steps or 1)
    if highest < _LITTLE * arguments.learning_rate:
        _log.warning(
            "the learning rate is at most %.2g in the %d steps of this run, less than a tenth of "
            "training.learning_rate=%g (training.warmup_steps=%g, lr_scheduler_type=%s): set fewer warmup_steps "
            "(a share such as 0.05 fits any length), or more steps",
            highest,
            steps,
            arguments.learning_rate,
            arguments.warmup_steps,
            SchedulerType(arguments.lr_scheduler_type).value,
        )


def _try_update(
    where: str, made: type[torch.optim.Optimizer], options: Mapping[str, Any], rate: float, arguments: TrainingArguments
) -> None:
    """Steps four weights of 1 by gradients of 0 and 1.

    Example: AdamW with an epsilon of 0 divides 0 by 0.
    """
    weight = torch.nn.Parameter(torch.ones(2, 2, device=arguments.device))
    weight.grad = torch.eye(2, device=arguments.device)
    with library_errors(where):
        optimizer = made([{"params": [weight], "weight_decay": arguments.weight_decay, "lr": rate}], **options)
        getattr(optimizer, "train", lambda: None)()  # those without a schedule want to be told
        optimizer.step()
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(
            f"{where} makes weights that are no numbers in its first update: see training.learning_rate, weight_decay, "
            "adam_epsilon and optim_args"
        )


def _refuse_idle_names(arguments: TrainingArguments, model: Any, options: Mapping[str, Any]) -> None:
    """Refuses names in `optim_args` that transformers does not read for this optimiser: it drops them silently.

    Each is given another value: one that is read changes the optimiser's options, or is no value for it.
    """
    given = [one.split("=")[0] for one in (arguments.optim_args or "").replace(" ", "").split(",") if one]
    for name in given:
        if name == "weight_decay":
            raise ConfigError("training.optim_args names weight_decay, which is training.weight_decay: set that")
        if name not in options and not _is_read(name, arguments, model):
            optimiser = OptimizerNames(arguments.optim).value
            raise ConfigError(f"training.optim_args names {name!r}, which {optimiser} does not read: take it out")


def _is_read(name: str, arguments: TrainingArguments, model: Any) -> bool:
    """Whether an optimiser's options depend on a name in `optim_args`."""
    found, kept = [], arguments.optim_args
    try:
        for text in (None, f"{name}=0.123"):
            arguments.optim_args = text
            found.append(Trainer.get_optimizer_cls_and_kwargs(arguments, model)[1])
    except (ValueError, AttributeError):
        return True
    finally:
        arguments.optim_args = kept
    return bool(found[0] != found[1])


def _highest_rate(arguments: TrainingArguments, steps: int) -> float:
    """The highest learning rate of a run's steps; refuses a run in each of whose steps it is 0.

    Example: one step is the first of any warm-up, which begins at 0.
    """
    name, kwargs = SchedulerType(arguments.lr_scheduler_type).value, dict(arguments.lr_scheduler_kwargs or {})
    idle = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    with library_errors(f"training.lr_scheduler_type={name} with lr_scheduler_kwargs={kwargs}"):
        schedule = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=idle,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=kwargs,
        )
    highest = 0.0
    for _ in range(steps):
        highest = max(highest, float(idle.param_groups[0]["lr"]))
        if highest >= _LITTLE * arguments.learning_rate and highest > 0:
            return highest  # runs of many steps are not walked through
        idle.step()
        schedule.step()
    if highest > 0:
        return highest
    raise ConfigError(
        f"the learning rate is 0 in each of the {steps} steps (training.warmup_steps={arguments.warmup_steps:g}, "
        f"lr_scheduler_type={name}), so nothing would train: set training.warmup_steps=0, or more steps"
    )
