"""Weights & Biases and TensorBoard, as callbacks that write into the run's folder.

Both packages are optional; a recipe that names a missing one gets a single line with the command that installs it.
"""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from phi3v.errors import ConfigError, MissingPackageError, install
from phi3v.evaluation.prediction_table import prediction_table
from phi3v.passthrough import first_line
from phi3v.plain_json import to_json
from phi3v.run_folder import RunFolder
from phi3v.training.sample_answers import SampleAnswer

_OFFLINE = "set WANDB_MODE=offline to keep what it logs in the run's folder"
_log = logging.getLogger(__name__)


def tracker_callbacks(
    names: list[str], *, folder: Path, project: str | None, run_name: str, config: dict[str, Any], done: int = 0
) -> list[TrainerCallback]:
    """One callback per tracker, each with a method `log_answers(step, answers)`.

    A tracker that fails while the run trains is left with a warning: what it shows stands in `metrics.jsonl` too.

    Args:
        names: "wandb" and "tensorboard", in any number.
        folder: the run's folder; W&B writes to `wandb/`, TensorBoard to `tensorboard/` in it.
        project: project at W&B, None for its own default.
        run_name: name of the run.
        config: the recipe as plain values, shown by W&B.
        done: steps of the checkpoint that the run goes on from: TensorBoard shows no later ones of before, W&B goes on
            with its own run.

    Raises:
        MissingPackageError: a tracker is not installed.
        ConfigError: W&B knows no account, or a tracker cannot begin.
    """
    makers: dict[str, Callable[[], TrainerCallback]] = {
        "wandb": lambda: _wandb(folder, project, run_name, config),
        "tensorboard": lambda: _tensorboard(folder, done),
    }
    check_trackers(names)
    return [_spared(name, _begun(name, makers[name])) for name in names]


def _begun(name: str, make: Callable[[], TrainerCallback]) -> TrainerCallback:
    """A tracker's callback. Raises: ConfigError where its server or its folder is not to be had."""
    try:
        return make()
    except Exception as error:  # of the tracker, of its HTTP library, or of the system
        way_out = f", or {_OFFLINE}" if name == "wandb" else ""
        raise ConfigError(
            f"report.to names {name}, which cannot begin ({first_line(error)}): see its network and folder{way_out}, "
            "or take it out of report.to"
        ) from error


def _spared(name: str, callback: Any) -> TrainerCallback:
    """The callback; its first error ends the tracker, and never the training."""
    gone = False

    def sparing(tell: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(tell)
        def told(*args: Any, **kwargs: Any) -> None:
            nonlocal gone
            if gone:
                return
            try:
                tell(*args, **kwargs)
            except Exception as error:
                gone = True
                _log.warning(
                    "%s failed (%s): nothing more is shown there, the run goes on, and metrics.jsonl has each figure",
                    name,
                    first_line(error),
                )

        return told

    for event in dir(callback):
        if event.startswith("on_") or event == "log_answers":
            setattr(callback, event, sparing(getattr(callback, event)))
    spared: TrainerCallback = callback
    return spared


def check_trackers(names: Iterable[str]) -> None:
    """Raises: MissingPackageError when a tracker is not installed, ConfigError when W&B knows no account."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(f"report.to names {name}, which is not installed: {install('tracking')}")
        if name == "wandb":
            _check_account()


def _check_account() -> None:
    """Raises: ConfigError when a run at W&B would ask for a key; nobody is asked, here or there."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode  # a setup from before keeps the mode of then
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ConfigError(f"report.to names wandb, which knows no account here: run `wandb login`, or {_OFFLINE}")


def _wandb(folder: Path, project: str | None, run_name: str, config: dict[str, Any]) -> TrainerCallback:
    """Opens a W&B run (offline with WANDB_MODE=offline) that the Trainer's own callback then uses."""
    import wandb
    from transformers.integrations import WandbCallback

    again: dict[str, Any] = {"id": number, "resume": "allow"} if (number := _wandb_id(folder)) else {}
    again["reinit"] = "finish_previous"  # a training of this process that failed has left its own open
    wandb.init(project=project, name=run_name, dir=str(folder), config=config, **again)

    class ClosingWandbCallback(WandbCallback):
        """Closes the run at the end of the training, so that a next one in this process gets its own."""

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_end(*args, **kwargs)
            wandb.finish()

        def log_answers(self, step: int, answers: Sequence[SampleAnswer]) -> None:
            """A table of this step's answers with their photos."""
            rows = [
                [step, wandb.Image(side_by_side(one.photos)), one.question, one.expected, one.answer] for one in answers
            ]
            table = wandb.Table(columns=["step", "images", "question", "expected", "answer"], data=rows)
            with _photos_in(folder):
                wandb.log({"answers": table, "train/global_step": step})

    return ClosingWandbCallback()


@contextlib.contextmanager
def _photos_in(folder: Path) -> Iterator[None]:
    """Where W&B is offline, what it copies in this context for a later upload lies in the run's folder.

    Photos of a table go through an artifact, which it else keeps in the user's own data folder. It reads the variable
    at each copy, and the next run of this process gets its own.
    """
    import wandb

    name = "WANDB_DATA_DIR"
    if name in os.environ or wandb.run is None or not wandb.run.offline:
        yield
        return
    os.environ[name] = str(folder.absolute() / "wandb" / "data")
    try:
        yield
    finally:
        os.environ.pop(name, None)


def log_predictions(run: RunFolder) -> None:
    """Adds predictions as a table, and the scores, to a run's own run at W&B, where its recipe names that.

    Photos are not in the table: those of a few rows are in report.html, which lies beside it.
    """
    recipe = run.read_recipe()
    if "wandb" not in recipe.report.to or not run.evaluation.is_file():
        return
    check_trackers(["wandb"])
    import wandb

    columns, rows = prediction_table(run.read_predictions())
    cells = [[to_json(value) if isinstance(value, list) else value for value in row.values()] for row in rows]
    evaluation = run.read_evaluation(needed=["metrics"])
    metrics, digests = evaluation["metrics"], evaluation.get("fingerprints", {})
    scores = {f"{side}/{name}": one[side]["value"] for name, one in metrics.items() for side in _SIDES if one[side]}
    name, number = recipe.report.run_name or run.path.name, _wandb_id(run.path)
    try:
        opened = wandb.init(name=name, id=number, resume="allow", project=recipe.report.project, dir=str(run.path))
        with _photos_in(run.path):
            opened.log({"predictions": wandb.Table(columns=list(columns), data=cells)})
        opened.summary.update({name: value for name, value in scores.items() if value is not None})
        opened.summary.update({f"fingerprints/{name}": digest for name, digest in digests.items()})
        opened.finish()
    except Exception as error:  # of W&B, of its HTTP library, or of the system: the run is done all the same
        _log.warning("wandb got no predictions (%s): they are in predictions.jsonl", first_line(error))


_SIDES = ("tuned", "base")


def _wandb_id(folder: Path) -> str | None:
    """The id of the run's newest W&B run, by its folder: wandb/offline-run-20261126_063000-k3j9x2ab -> "k3j9x2ab"."""
    found = sorted((folder / "wandb").glob("*run-*-*"), key=lambda path: path.stat().st_mtime)
    return found[-1].name.partition("run-")[2].partition("-")[2] if found else None  # WANDB_RUN_ID may have hyphens


def side_by_side(photos: Sequence[Any]) -> Any:
    """Photos [height, width, 3] in one picture, shorter ones filled up with white; a white dot where there are none.

    Example: photos of 30x40 and 20x10 pixels (height x width) -> one of 30x50.
    """
    height = max((photo.height for photo in photos), default=1)
    wide = np.full((height, max(1, sum(photo.width for photo in photos)), 3), 255, np.uint8)
    left = 0
    for photo in photos:
        wide[: photo.height, left : left + photo.width] = np.asarray(photo.convert("RGB"))
        left += photo.width
    return wide


def _tensorboard(folder: Path, done: int) -> TrainerCallback:
    """A TensorBoard writer below the run's folder."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    writer = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=done + 1)

    class AnsweringTensorBoardCallback(TensorBoardCallback):
        """Writes answers beside the figures."""

        def log_answers(self, step: int, answers: Sequence[SampleAnswer]) -> None:
            """The answers of a step as text, and their photos."""
            for one in answers:
                writer.add_text(f"answers/row {one.row}", f"{one.answer} (expected: {one.expected})", step)
                for number, photo in enumerate(one.photos):
                    writer.add_image(f"row {one.row}/{number}", np.asarray(photo), step, dataformats="HWC")

    return AnsweringTensorBoardCallback(writer)
