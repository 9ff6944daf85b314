"""What an evaluation leaves in a folder, a run's or one of its own: predictions, scores and the report.

In come an `Evaluation`, the rows that it is about and the folder; out come the files. A folder of its own
(`phi3v evaluate --out`) has the files of a run's evaluation under the same names, so that they are read in the same
way, and holds one evaluation. Answers nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError
from phi3v.evaluation.answer_files import writable, write_parquet
from phi3v.evaluation.prediction_table import prediction_table
from phi3v.evaluation.result import Evaluation, HeldOut
from phi3v.plain_json import to_json
from phi3v.run_folder import RunFolder
from phi3v.run_lock import LOCK_FILE
from phi3v.targets import Target

_FILES = ("predictions.jsonl", "predictions.parquet", "evaluation.json", "report.html", LOCK_FILE)
_LEFT = (*_FILES, "answers-*.jsonl", ".*.tmp")
"""Names of what stands in a folder of its own; the last two are those of a start that was cut off."""


def open_folder(out: str | Path) -> RunFolder:
    """Makes the folder that `evaluate` writes into, or takes one that holds an evaluation and nothing else.

    Raises: ConfigError for a folder with other things in it, and for one that cannot be made.
    """
    place = Path(out)
    try:
        place.mkdir(parents=True, exist_ok=True)
        names = sorted(entry.name for entry in place.iterdir())
    except OSError as error:
        raise ConfigError(f"--out {place} cannot be used ({error.strerror or error}): name another folder") from error
    if other := [name for name in names if not any(fnmatch(name, known) for known in _LEFT)]:
        raise ConfigError(
            f"--out {place} holds {other[0]}, which is of no evaluation: name a folder that is new or empty"
        )
    return RunFolder(place)


def refuse_another(
    folder: RunFolder, place: Target, other: Target | object, held_out: HeldOut, settings: Mapping[str, Any]
) -> None:
    """Refuses a folder with the finished evaluation of something else, or under other settings.

    Args:
        folder: see `open_folder`.
        place: what is to answer.
        other: what is to stand beside it, where that is a target.
        held_out: the rows.
        settings: see `Evaluation`.
    Raises: ConfigError; CheckpointError where the evaluation that is there cannot be read.
    """
    if not folder.evaluation.is_file():
        return
    found = folder.read_evaluation(needed=("target", "base", "against", "data"))
    beside = found["base"] if found["against"] == "target" else None
    wanted = other.name if isinstance(other, Target) else None
    if (found["target"], found["data"], beside) != (place.name, held_out.data, wanted):
        told = f"{found['target']} on {found['data']}" + (f" beside {beside}" if beside else "")
        raise ConfigError(f"--out {folder.path} holds the evaluation of {told}: name another folder")
    if changed := _changed(found.get("settings", {}), settings):
        told = "; ".join([*changed[:3], *(["..."] if changed[3:] else [])])
        raise ConfigError(f"--out {folder.path} holds an evaluation under other settings ({told}): name another folder")


def refuse_other_weights(folder: RunFolder, place: Target, other: Target | object, side: str, weights: str) -> None:
    """Refuses a folder with the finished evaluation of other weights, which lay under the same name then.

    Args:
        folder: see `open_folder`.
        place: what answers.
        other: what stands beside it, where that is a target.
        side: whose weights they are, "tuned" for instance.
        weights: their name.
    Raises: ConfigError; one that was written before weights were named is taken.
    """
    if not folder.evaluation.is_file():
        return
    if folder.read_evaluation().get("weights", {}).get(side, weights) != weights:
        named = other.name if side.startswith("other") and isinstance(other, Target) else f"{place.name}, or its base,"
        raise ConfigError(
            f"--out {folder.path} holds an evaluation by other weights ({named} was changed since): name another folder"
        )


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between settings: ["evaluation.rows: 4 there, 6 here"]; rows alone where nothing else does."""
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if keys == ["rows"]:
        return ["other rows or images"]
    return [f"{key}: {to_json(then.get(key))} there, {to_json(now.get(key))} here" for key in keys if key != "rows"]


def write_evaluation(folder: RunFolder, evaluation: Evaluation, held_out: HeldOut) -> None:
    """Writes predictions.jsonl, predictions.parquet, evaluation.json and report.html.

    Args:
        folder: of a run, or one of its own.
        evaluation: what was found.
        held_out: the rows.
    """
    from phi3v.evaluation.report_run import write_report, write_report_apart

    folder.write_predictions(evaluation.predictions)
    columns, rows = prediction_table(evaluation.predictions)
    about = {f"phi3v.fingerprints.{name}": digest for name, digest in evaluation.fingerprints.items()}
    folder.write_prediction_table(lambda file: write_parquet(file, columns, map(writable, rows), about))
    folder.write_evaluation(evaluation.to_dict())
    if RunFolder.is_run(folder.path):
        write_report(folder, held_out.rows)
    else:
        write_report_apart(folder, evaluation, held_out)
