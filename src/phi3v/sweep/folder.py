"""A sweep on disk.

    sweep.yaml       the sweep's recipe
    study.json       the study's name in its storage
    rows.json        names of the rows and photos that all trials have
    study.db         the storage, where the recipe names no other
    trials/0007/     a trial: a run as `phi3v train` makes it, without checkpoints once it has ended
    trials/0007.lock held by the process whose trial it is
    ranking.json     all trials, the best first; ranking.csv is the same as a table
    base.json        the score of what trials begin with
    best.yaml        the best trial's recipe, written last
    *.png            Optuna's plots
    worker-1.log     what a worker process said

Files are replaced whole. Knows nothing of Optuna.
"""

import csv
import io
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError
from phi3v.plain_json import to_json
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.whole_files import replace_file

_FREE = ("trials", "timeout", "workers")
"""Keys of `sweep` that may be other ones when a sweep goes on."""


_BEGINNING = ("trials", "sweep.yaml", "sweep.lock", "study.db")
"""What a start leaves that was cut off before it had a study."""


class SweepFolder:
    """The files of one sweep."""

    def __init__(self, path: str | Path) -> None:
        """Name the folder; nothing is read or made."""
        self.path = Path(path)
        self.recipe = self.path / "sweep.yaml"
        self.study = self.path / "study.json"
        self.database = self.path / "study.db"
        self.trials = self.path / "trials"
        self.ranking = self.path / "ranking.json"
        self.table = self.path / "ranking.csv"
        self.best = self.path / "best.yaml"
        self.rows = self.path / "rows.json"
        self.base = self.path / "base.json"
        self.lock = self.path / "sweep.lock"

    def start(self, recipe: Recipe) -> None:
        """Makes the folder for a sweep, or opens it.

        Raises: ConfigError when it holds something else, or a sweep of another recipe.
        """
        if not self.study.is_file():  # new, or its storage could not be opened
            self._refuse_foreign_folder()
        else:
            changed = [line for line in Recipe.load(self.recipe).differences(recipe) if not _is_free(line)]
            if changed:
                raise ConfigError(
                    f"{self.path} holds a sweep of another recipe ({'; '.join(changed[:5])}): give another output, or "
                    "the same recipe to go on with it"
                )
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            if not self.study.is_file():
                replace_file(self.recipe, recipe.with_places().to_yaml())
        except OSError as error:
            raise ConfigError(f"output {self.path} cannot be used ({error}): give another folder") from error

    def _refuse_foreign_folder(self) -> None:
        """Refuses all but a new folder, an empty one, and one with what a cut-off start left."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output {self.path} is a file: give a folder that is new or empty")
        if self.path.is_dir():
            found = [entry.name for entry in sorted(self.path.iterdir())]
            if foreign := [name for name in found if name not in _BEGINNING and not name.startswith(".")]:
                raise ConfigError(
                    f"output {self.path} holds {foreign[0]} and is no sweep: give a folder that is new or empty"
                )

    def study_name(self) -> str:
        """The study's name in its storage, chosen once for all processes; ask for it inside of the lock."""
        if not self.study.is_file():
            name = f"{os.path.basename(self.path.absolute())}-{uuid.uuid4().hex[:8]}"
            replace_file(self.study, to_json({"study": name}) + "\n")
        try:
            return str(json.loads(self.study.read_text(encoding="utf-8"))["study"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.study} cannot be read: {error}; name the study in it, or remove it") from error

    def run(self, number: int) -> RunFolder:
        """The run of a trial."""
        return RunFolder(self.trials / f"{number:04d}")

    def drop_checkpoints(self, number: int) -> None:
        """Removes what only a trial that goes on needs."""
        shutil.rmtree(self.run(number).checkpoints, ignore_errors=True)

    def write_ranking(self, ranking: dict[str, Any]) -> None:
        """Writes ranking.json and ranking.csv, in which the base has the last row."""
        replace_file(self.ranking, to_json(ranking, indent=2) + "\n")
        keys = list(ranking["search"])
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        plain = ("rank", "trial", "state", "value", "low", "high", "loss", "steps", "seconds", "error")
        writer.writerow([*plain, *keys])
        for line in ranking["trials"]:
            values = [line["values"].get(key) for key in keys]
            writer.writerow([*(line.get(name) for name in plain), *(_cell(value) for value in values)])
        if base := ranking["base"]:
            writer.writerow([*({"state": "base", **base}.get(name) for name in plain), *([None] * len(keys))])
        replace_file(self.table, text.getvalue())

    def write_best(self, text: str) -> None:
        """Writes best.yaml."""
        replace_file(self.best, text)

    def write_base(self, score: dict[str, Any]) -> None:
        """Writes base.json."""
        replace_file(self.base, to_json(score, indent=2) + "\n")

    def write_rows(self, names: dict[str, str | None]) -> None:
        """Writes rows.json."""
        replace_file(self.rows, to_json(names, indent=2) + "\n")

    def read_rows(self) -> dict[str, str | None]:
        """What `write_rows` wrote; {} where it did not."""
        try:
            return dict(json.loads(self.rows.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def read_base(self) -> dict[str, Any] | None:
        """What `write_base` wrote, None where it did not or the file is broken: then the base is asked again."""
        try:
            found = json.loads(self.base.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return (
            found if isinstance(found, dict) and ("error" in found or {"value", "low", "high"} <= set(found)) else None
        )


def _is_free(line: str) -> bool:
    """Whether a difference between recipes leaves the sweep what it is: "sweep.trials: 20 here, 30 there"."""
    key = line.partition(":")[0]
    return any(key == f"sweep.{name}" for name in _FREE)


def _cell(value: Any) -> Any:
    """A value as a cell of a table: lists and mappings as JSON."""
    return to_json(value) if isinstance(value, list | dict) else value
