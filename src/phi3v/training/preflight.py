"""What is wrong with a recipe by itself: found before its rows are read, its weights loaded, or a file written.

In comes a recipe, out comes nothing or an error of one line. What rows or weights are needed for (columns of templates,
modules that LoRA hits) is found later, still before the first step and before the run's folder is made.
"""

import os

from huggingface_hub import HfApi

from phi3v.errors import ConfigError
from phi3v.evaluation.fields import AnswerTemplate, choose_numeric_fields
from phi3v.evaluation.kinds import check_metrics
from phi3v.launch import Launch
from phi3v.passthrough import first_line
from phi3v.recipe import Recipe
from phi3v.targets import check_whole_model
from phi3v.training.arguments import check_options
from phi3v.training.prepare import adapter_place
from phi3v.training.trackers import check_trackers
from phi3v.tuning import lora_config

_OTHER_LAUNCHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which mpirun says how many processes there are, as accelerate reads them."""
_OF_ACCELERATE = "ACCELERATE_USE_CPU"
"""What accelerate's launcher of one process always sets, and that of several never."""
_FILES = (".yaml", ".yml", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def check_recipe_alone(recipe: Recipe) -> None:
    """Refuses a recipe whose options, fields or trackers cannot be.

    Raises:
        ConfigError: an option of training or lora, a model that is a run or an adapter, a name in
            evaluation.numeric_fields or evaluation.metrics, or no account at W&B.
        DataError: the answer template.
        MissingPackageError: a tracker or the package of a metric that is not installed.
    """
    refuse_other_launchers()
    check_options(recipe.training.options)
    if recipe.lora is not None:
        lora_config(recipe.lora)
    check_whole_model(recipe.model.name)
    if recipe.model.adapter is not None:
        adapter_place(recipe.model.adapter, recipe.model.name)
    template = AnswerTemplate(recipe.data.answer)
    choose_numeric_fields([], template, recipe.evaluation.numeric_fields)
    check_metrics(recipe.evaluation.metrics or [], template)
    _check_kept(recipe)
    check_trackers(recipe.report.to)


def _check_kept(recipe: Recipe) -> None:
    """Refuses a file of evaluation.keep that is not there: it is read when the training is over."""
    keep = recipe.evaluation.keep
    if keep is not None and keep.lower().endswith(_FILES) and not os.path.exists(keep) and "*" not in keep:
        raise ConfigError(f"evaluation.keep names {keep}, which does not exist: name a data set, or a recipe")


def refuse_other_launchers() -> None:
    """Refuses mpirun, each of whose processes would take whole steps of its own, and one process alone of several.

    `accelerate launch` without several GPUs starts one process, however many it is asked for, and tells it where others
    would be met, but no number: that is all that there is to see of it. Raises: ConfigError.
    """
    for name in _OTHER_LAUNCHERS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1 and Launch.here().count == 1:
            raise ConfigError(
                f"{name} is {count}: {count} processes that do not know of each other would each train all of it; "
                f"start them with torchrun --nproc-per-node={count} -m phi3v train"
            )
    if {_OF_ACCELERATE, "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes and started this one alone, as it does without several "
            "GPUs (MASTER_PORT is set, WORLD_SIZE is not): start them with torchrun --nproc-per-node=2 -m phi3v train, "
            "or this one with --num_processes=1"
        )


def check_upload(recipe: Recipe) -> None:
    """Asks the hub who is there, where a recipe has its checkpoints uploaded, before anything is loaded.

    Raises: ConfigError when the hub cannot be reached or knows no account by the token.
    """
    options = recipe.training.options
    if not options.get("push_to_hub"):
        return
    try:
        HfApi().whoami()
    except Exception as error:  # of huggingface_hub, of its HTTP library, or of the system
        raise ConfigError(
            f"training.push_to_hub is true and the hub knows no account here ({first_line(error)}): see the network "
            "and HF_TOKEN, or take it out"
        ) from error
