"""A run on disk: who writes and reads which file. Nothing else in the package opens a file of a run.

    recipe.yaml        the resolved recipe, local paths absolute; `output` in it is the folder that it lies in
    versions.json      Python, platform and package versions at the start; with recipe.yaml it makes a folder a run
    conditions.json    what it began under: names of rows and base, device, versions
    problems.jsonl     one JSON object per row that is left out, with its reason
    features.json      how many images have kept features, where the recipe keeps them
    metrics.jsonl      one JSON object per logged step, appended
    checkpoints/       what resuming needs, filled by the trainer
    run.lock           held by the process that trains or evaluates, see `run_lock`
    adapter/           the tuned adapter with the processor, and digests.json with the SHA-256 of each file, or
    model/             the whole model, when all of it was tuned, with the same
    answers-*.jsonl    answers of an evaluation that is not done, tuned and base: what it goes on from
    predictions.jsonl  one JSON object per evaluated row; predictions.parquet is the same as a table
    evaluation.json    the scores
    report.html        the report; loss.png is its curve
    finished.json      there when the run has reached its end; holds its summary

Files are replaced whole (see `whole_files`); `metrics.jsonl` is appended line by line and a half last line is dropped.
JSON holds no NaN or infinity: they become null. Errors are `ConfigError` and `CheckpointError` (a file is broken).
"""

import functools
import json
import os
import platform
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from phi3v.digests import with_digests
from phi3v.errors import CheckpointError, ConfigError
from phi3v.plain_json import to_json
from phi3v.recipe import RUN_FILES, Recipe
from phi3v.run_lock import LOCK_FILE, RunLock
from phi3v.whole_files import fill_file, replace_file, replace_folder

RunState = Literal["new", "unfinished", "finished"]

VERSIONED_PACKAGES = tuple(
    "phi3v torch transformers peft accelerate datasets tokenizers safetensors pillow numpy".split()
)
"""Packages whose versions can change what a run computes."""
OPTIONAL_PACKAGES = ("bitsandbytes", "simplejpeg", "liger-kernel", "flash-attn", "flash-attn-4", "triton")
"""Those that only some runs compute with, and that need not be there."""
_PUT_BACK = "recipe.yaml: copy the recipe that began this run there ({}/recipe.yaml) to go on, or give another output"


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; nothing is read or made until a method asks for it.
    Example: `run = RunFolder("runs/shop"); run.start(recipe); run.append_metrics({"step": 1, "loss": 2.5})`.
    """

    def __init__(self, path: str | Path) -> None:
        """Name the folder of a run."""
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.versions = self.path / "versions.json"
        self.conditions = self.path / "conditions.json"
        self.problems = self.path / "problems.jsonl"
        self.features = self.path / "features.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.predictions = self.path / "predictions.jsonl"
        self.prediction_table = self.path / "predictions.parquet"
        self.evaluation = self.path / "evaluation.json"
        self.report = self.path / "report.html"
        self.finished = self.path / "finished.json"
        self.lock = RunLock(self.path)

    @staticmethod
    def is_run(path: str | Path) -> bool:
        """Whether a folder is a run: it holds what `start` writes, recipe.yaml and versions.json."""
        return all((Path(path) / name).is_file() for name in RUN_FILES)

    def state(self) -> RunState:
        """How far the run is: new (no run is there), unfinished, or finished (`mark_finished` was called)."""
        if not self.is_run(self.path):
            return "new"
        return "finished" if self.finished.is_file() else "unfinished"

    def has_weights(self) -> bool:
        """Whether tuned weights are there: an adapter, or a whole model."""
        adapter = [self.adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        return all(file.is_file() for file in adapter) or (self.model / "config.json").is_file()

    def start(self, recipe: Recipe) -> RunState:
        """Opens the folder for a run of `recipe` and says what was there before.

        A new run gets versions.json and recipe.yaml, local paths in it made absolute, so that the run can be used from
        any folder. An existing one takes the values that do not change the training (`recipe.SETTINGS`): recipe.yaml
        is written anew, and what was made with other ones (scores and report, or the report) is removed.
        The folder is locked from here on, see `RunLock`. Raises: ConfigError as `look`, and when it is locked already.
        """
        state = self.look(recipe)
        if state == "new":
            self._make_folder()
        self.lock.take()
        if state == "new":
            self.conditions.unlink(missing_ok=True)  # of a bare folder's other recipe
            self.write_recipe(recipe.with_places())
            self.write_versions(gather_versions())
        elif changed := recipe.differences(self.read_recipe()):
            self._take_settings(recipe, changed)
        return state

    def look(self, recipe: Recipe) -> RunState:
        """Says what `start` would find, and writes nothing.

        A run that stopped before it had anything to show, over a slip in its recipe for instance, counts as new for
        another recipe.
        Raises: ConfigError when the folder holds something else, or a run of a recipe that trains otherwise.
        """
        state = self.state()
        if state == "new":
            self._refuse_foreign_folder(recipe)
            return state
        if state == "unfinished" and self._is_bare() and recipe.differences(self.read_recipe()):
            return "new"
        if changed := recipe.differences(self.read_recipe(), settings=False):
            raise ConfigError(
                f"{self.path} holds a run of another recipe ({'; '.join(changed[:5])}"
                f"{f'; and {len(changed) - 5} more' if len(changed) > 5 else ''}): "
                "give another output, or the same recipe to go on with it"
            )
        return state

    def _is_bare(self) -> bool:
        """Whether the folder holds nothing but what `start` writes, and empty folders."""
        return all(
            entry in (self.recipe, self.versions, self.conditions, self.problems, self.features, self.lock.file)
            or (entry.is_dir() and not any(entry.iterdir()))
            for entry in self.path.iterdir()
        )

    def _take_settings(self, recipe: Recipe, changed: list[str]) -> None:
        """Writes the settings of a recipe into recipe.yaml; what others made goes first, in case this is cut off."""
        answered = any(line.startswith("evaluation.") for line in changed)
        reported = answered or any(line.startswith("report.") for line in changed)
        answers = (self.evaluation, self.predictions, self.prediction_table)
        for made in (*([self.report] if reported else []), *(answers if answered else [])):
            made.unlink(missing_ok=True)
        self.write_recipe(self.read_recipe().with_settings(recipe))

    def _make_folder(self) -> None:
        """Makes the folder, and takes half a file of a start that was cut off out of it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob(".recipe.yaml.*.tmp"):
                leftover.unlink()
        except OSError as error:
            raise ConfigError(f"output {self.path} cannot be used ({error}): give another folder") from error

    def _refuse_foreign_folder(self, recipe: Recipe) -> None:
        """Refuses all but a new folder, an empty one, and one with what a cut-off start of this recipe left."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output {self.path} is a file: give a folder that is new or empty")
        above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            why = "cannot be written to" if above.is_dir() else "is a file"
            raise ConfigError(f"output {self.path} cannot be used ({above} {why}): give another folder")
        try:
            entries = [entry.name for entry in self.path.iterdir()] if os.path.lexists(self.path) else []
            found = sorted(name for name in entries if not fnmatch(name, ".recipe.yaml.*.tmp") and name != LOCK_FILE)
            cut_off = found == ["recipe.yaml"] and self.recipe.read_text("utf-8") == recipe.with_places().to_yaml()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"output {self.path} cannot be used ({error}): give another folder") from error
        if self.recipe.name in found and len(found) > 1:
            raise ConfigError(
                f"output {self.path} holds {self.recipe.name} and no {self.versions.name}, and a run has both: bring "
                f"{self.versions.name} back to go on with it, or give a folder that is new or empty"
            )
        if {self.versions.name, self.checkpoints.name} <= set(found):
            raise ConfigError(f"output {self.path} holds {self.versions.name} and no {_PUT_BACK.format(self.path)}")
        if found and not cut_off:
            raise ConfigError(
                f"output {self.path} holds {found[0]} and is no run of phi3v: give a folder that is new or empty"
            )

    def write_recipe(self, recipe: Recipe) -> None:
        """Writes recipe.yaml."""
        replace_file(self.recipe, recipe.to_yaml())

    def read_recipe(self) -> Recipe:
        """The recipe of the run. Raises: CheckpointError when there is none, ConfigError when it is not valid."""
        if not self.recipe.is_file():
            raise CheckpointError(f"{self.path} is no run (it has no recipe.yaml): train it first, or name another")
        if self.versions.is_file() and not self.recipe.stat().st_size:
            raise CheckpointError(f"{self.path} holds an empty {_PUT_BACK.format(self.path)}")
        return Recipe.load(self.recipe)

    def recipe_for(self, target: str | Path) -> Recipe:
        """The recipe that the run, or what lies in it, is loaded by; number type and bits are its own weights' alone.

        Example: of a 4-bit run runs/q, runs/q/merged has it with `quantization: null` and `model.dtype: auto`.
        """
        path, recipe = Path(target).absolute(), self.read_recipe()
        own = self.model if recipe.lora is None else self.adapter
        if path in (self.path.absolute(), own.absolute()) or path.parent.name == "checkpoints":
            return recipe
        return recipe.with_overrides(["quantization=null", "model.dtype=auto"])

    def write_versions(self, versions: dict[str, str | None]) -> None:
        """Writes versions.json."""
        replace_file(self.versions, to_json(versions, indent=2) + "\n")

    def read_versions(self) -> dict[str, str | None]:
        """What `write_versions` wrote."""
        return self._read_json(self.versions)

    def write_problems(self, problems: Iterable[dict[str, Any]], *, anew: bool = False) -> None:
        """Writes problems.jsonl with what reading the rows found; what training found before stays, unless `anew`.

        Example: {"source": "shop.csv", "row": 3, "reason_code": "missing_value", "message": "column 'title' is empty"}
        -> the same line with "found": "reading".
        """
        found = [{**problem, "found": "reading"} for problem in problems]
        kept = [] if anew else [line for line in self.read_problems() if line.get("found") != "reading"]
        if found or kept or self.problems.is_file():
            replace_file(self.problems, "".join(to_json(line) + "\n" for line in [*found, *kept]))

    def append_problem(self, problem: dict[str, Any]) -> None:
        """Adds a row that turned out to be unusable in training; loader processes may do so at once."""
        with open(self.problems, "ab", buffering=0) as file:
            file.write((to_json({**problem, "found": "training"}) + "\n").encode())

    def read_problems(self) -> list[dict[str, Any]]:
        """The rows that were left out, each once, [] when there are none."""
        lines = self._read_lines(self.problems) if self.problems.is_file() else []
        return list({(line.get("source"), line.get("row")): line for line in reversed(lines)}.values())[::-1]

    def write_features(self, values: dict[str, Any]) -> None:
        """Writes features.json."""
        replace_file(self.features, to_json(values, indent=2) + "\n")

    def read_features(self) -> dict[str, Any]:
        """What `write_features` wrote. Raises: CheckpointError when the run keeps no features."""
        return self._read_json(self.features)

    def write_begun(self, values: dict[str, Any]) -> None:
        """Writes conditions.json: what the run begins under, before it has a checkpoint, whose manifest has it too."""
        replace_file(self.conditions, to_json(values, indent=2) + "\n")

    def read_begun(self) -> dict[str, Any]:
        """What `write_begun` wrote; {} where there is none, or a broken one: it is for a warning alone."""
        try:
            return self._read_json(self.conditions)
        except CheckpointError:
            return {}

    def read_conditions(self) -> dict[str, Any]:
        """What the newest checkpoint was trained under: names of rows and base, device, versions; {} without."""
        found = sorted(self.checkpoints.glob("checkpoint-*/manifest.json"), key=lambda file: file.stat().st_mtime)
        manifest = self._read_json(found[-1]).get("manifest") if found else None
        conditions = manifest.get("conditions") if isinstance(manifest, dict) else None
        return conditions if isinstance(conditions, dict) else {}

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl and sees it onto the disk.

        Example: {"step": 10, "loss": 0.5, "grad_norm": float("nan")} -> `{"step": 10, "loss": 0.5, "grad_norm": null}`.
        """
        line = (to_json(values) + "\n").encode()
        with open(self.metrics, "ab+") as file:
            _drop_half_line(file)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in their order, [] when there are none; a half last line is left out."""
        return self._read_lines(self.metrics) if self.metrics.is_file() else []

    def keep_metrics(self, last_step: int, of_last: int | None = None) -> None:
        """Drops the lines of steps after `last_step`: they are about to be computed again from a checkpoint.

        Of `last_step` itself the first `of_last` lines stay, those that the checkpoint knows, with answers to held-out
        rows that stand between them, and what says that it was left out; None for all.
        Example: lines of steps 5, 10, 10, 15 with last_step 10 and of_last 1 -> 5, 10. Lines without a step stay.
        """
        kept = [line for line in self.read_metrics() if line.get("step", 0) <= last_step]
        if of_last is not None:
            of_step = [n for n, line in enumerate(kept) if line.get("step") == last_step and "left_out" not in line]
            known = [place for place in of_step if "answers" not in kept[place]][:of_last]
            end = known[-1] if known else -1
            kept = [line for place, line in enumerate(kept) if place not in of_step or place <= end]
        if self.metrics.is_file():
            replace_file(self.metrics, "".join(to_json(line) + "\n" for line in kept))

    def write_predictions(self, rows: Iterable[dict[str, Any]]) -> None:
        """Writes predictions.jsonl, one object per row."""
        replace_file(self.predictions, "".join(to_json(row) + "\n" for row in rows))

    def answers(self, side: str) -> Path:
        """The journal of an evaluation's side, "tuned" for instance, which the evaluation writes and removes."""
        return self.path / f"answers-{side}.jsonl"

    def read_predictions(self) -> list[dict[str, Any]]:
        """What `write_predictions` wrote. Raises: CheckpointError when the run was not evaluated."""
        return self._read_lines(self.predictions)

    def write_prediction_table(self, save: Callable[[Path], Any]) -> None:
        """Puts predictions.parquet in place, which `save(file)` writes."""
        fill_file(self.prediction_table, save)

    def write_evaluation(self, values: dict[str, Any]) -> None:
        """Writes evaluation.json."""
        replace_file(self.evaluation, to_json(values, indent=2) + "\n")

    def read_evaluation(self, needed: Iterable[str] = ()) -> dict[str, Any]:
        """What `write_evaluation` wrote. Raises: CheckpointError when there is none, or not with all that is needed."""
        return self._read_json(self.evaluation, needed)

    def write_report(self, html: str) -> None:
        """Writes report.html."""
        replace_file(self.report, html)

    def write_adapter(self, save: Callable[[Path], Any]) -> None:
        """Fills adapter/ through `save(folder)`, with digests; the old one stays until the new one is complete."""
        replace_folder(self.adapter, with_digests(save))

    def write_model(self, save: Callable[[Path], Any]) -> None:
        """Fills model/ through `save(folder)`, with digests; the old one stays until the new one is complete."""
        replace_folder(self.model, with_digests(save))

    def mark_finished(self, summary: dict[str, Any] | None = None) -> None:
        """Says that the run has reached its end, with a few figures about it."""
        replace_file(self.finished, to_json(summary or {}, indent=2) + "\n")

    def read_summary(self, needed: Iterable[str] = ()) -> dict[str, Any]:
        """What `mark_finished` wrote. Raises: CheckpointError when there is none, or not with all that is needed."""
        return self._read_json(self.finished, needed)

    def _read_json(self, path: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
        """The object in a JSON file of this run, which has at least the keys that are needed."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or (lacking := sorted(set(needed) - set(content))):
                raise ValueError(f"it lacks {lacking[0]}" if isinstance(content, dict) else "it holds no JSON object")
            return content
        except FileNotFoundError as error:
            raise CheckpointError(f"run {self.path} has no {path.name} yet") from error
        except (OSError, ValueError) as error:
            again = f"`phi3v evaluate {self.path}`" if path == self.evaluation else f"`phi3v train {self.recipe}`"
            raise CheckpointError(f"{path} cannot be read: {error}; remove it, and {again} writes it again") from error

    def _read_lines(self, path: Path) -> list[dict[str, Any]]:
        """The objects of a JSONL file of this run; text after the last newline is a half line and left out."""
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError as error:
            raise CheckpointError(f"run {self.path} has no {path.name} yet") from error
        rows = []
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(f"{path}, line {number}: not JSON: {error}; remove that line") from error
        return rows


@functools.cache
def gather_versions() -> dict[str, str | None]:
    """Versions of Python, of the platform and of `VERSIONED_PACKAGES`; null where one is not installed.

    Those of `OPTIONAL_PACKAGES` are there where they are installed.
    """
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in (*VERSIONED_PACKAGES, *OPTIONAL_PACKAGES):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package in VERSIONED_PACKAGES:
                versions[package] = None
    return versions


def _drop_half_line(file: Any) -> None:
    """Cuts a file opened with "ab+" after its last newline: b'a\\nb' -> b'a\\n'."""
    file.seek(0, os.SEEK_END)
    if not (size := file.tell()):
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
