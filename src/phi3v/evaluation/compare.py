"""Several evaluated runs side by side: their folders in, a `Comparison` and its page out. Loads no model.

Runs are compared by what their evaluations wrote. The first run is the one that the others are tested against, row by
row, on the rows that both answered: same file, same number, same expected answer, photos of the same names. The photos
count since numbers move where a file lost a row: of answers from A to D a quarter would still be the same.
Files are told by their names, so a set may have moved, and by as much of their folders as tells them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from phi3v.errors import CheckpointError, ConfigError
from phi3v.evaluation.categories import path_depth, path_end
from phi3v.evaluation.figures import counted, rows_about
from phi3v.evaluation.intervals import estimate, mean
from phi3v.evaluation.paired import LEAST_ROWS, paired_test
from phi3v.evaluation.row_scores import Column, Groups
from phi3v.run_folder import RunFolder
from phi3v.whole_files import refuse_foreign, replace_file

RowName = tuple[str, int, str, tuple[str, ...], int]
"""Its file as in `_row_names`, number, expected answer, names of its photos, and which one of equal ones, from 0."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        primary: the metric that stands for the whole, that of the first run.
        runs: one dict per run: "name", "folder", "rows", "images" (see `count_groups`; None of an older evaluation),
            "metrics" (name -> "metric", "field", "label", "unit", "better", the tuned answers' "value", "low", "high",
            "rows", and the controls: "base", the base's or None, and "constant", the best single answer to every row),
            "constant_answer" (that answer; None of an older evaluation, whose control is the most frequent one),
            "checks" (name -> "verdict", "line" and, where it has one, "metric"),
            "shared_rows" (those that the first run answered too),
            "beside_first" (name -> on these rows: "own" and "first", the values of both, "difference", "p", "test",
            "won", "lost", "tied"), "tested_on", which says which rows these are where they are not all of both runs
            (else None), and "why_not", which says why nothing is tested.
        recipes: dotted key -> its value in each run, for keys that differ; versions are below `versions.`.
        disagreements: rows of the first run that some of the runs that answered them got right and others did not:
            "row", "source", "question", "expected", and for each of these runs, by name, "answers" and "right".
        metrics: the lines of each run's metrics.jsonl.
        out: the page; None where none was written.
    """

    primary: str
    runs: list[dict[str, Any]]
    recipes: dict[str, list[Any]]
    disagreements: list[dict[str, Any]]
    metrics: list[list[dict[str, Any]]] = field(repr=False)
    out: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, as plain values for JSON."""
        return {
            "primary": self.primary,
            "runs": self.runs,
            "recipes": self.recipes,
            "disagreements": self.disagreements,
            "out": None if self.out is None else str(self.out),
        }


@dataclass(frozen=True)
class _Run:
    """A run's files, read: `rows` is its predictions by what each row is."""

    name: str
    folder: RunFolder
    evaluation: Mapping[str, Any]
    rows: Mapping[RowName, Mapping[str, Any]]


def compare(runs: Sequence[str | Path], out: str | Path | None = None) -> Comparison:
    """Puts runs side by side, and each beside the first.

    Args:
        runs: folders of evaluated runs, two or more.
        out: an HTML file to write; None for none.

    Raises:
        ConfigError: fewer than two runs, or `out` cannot be written or holds something else.
        CheckpointError: one is no run, or was not evaluated.
    """
    if len({Path(run).resolve() for run in runs}) < max(2, len(runs)):
        raise ConfigError("compare takes two runs or more, each once: phi3v compare runs/one runs/other")
    page = None if out is None else _checked(Path(out))
    files = [_read(Path(run)) for run in runs]
    depth = max(path_depth({one["source"] for one in predictions}) for _, _, predictions in files)
    read = [
        _Run(name, folder, evaluation, _row_names(predictions, depth))
        for name, (folder, evaluation, predictions) in zip(_names(runs), files, strict=True)
    ]
    first, primary = read[0], str(read[0].evaluation["primary"])
    found = Comparison(
        primary=primary,
        runs=[_facts(run, first) for run in read],
        recipes=differing([_settings(run.folder) for run in read]),
        disagreements=_disagreements(read),
        metrics=[run.folder.read_metrics() for run in read],
        out=page,
    )
    if page is not None:
        from phi3v.evaluation.compare_page import render_comparison

        try:
            replace_file(page, render_comparison(found.to_dict(), found.metrics))
        except OSError as error:
            raise ConfigError(f"--out {page} cannot be written: {error.strerror or error}") from error
    return found


def _checked(out: Path) -> Path:
    """A file that may be written. Raises: ConfigError for a folder, one in no folder, and what is no such page."""
    if out.is_dir() or not out.parent.is_dir():
        why = "is a folder" if out.is_dir() else f"lies in {out.parent}, which is no folder"
        raise ConfigError(f"--out {out} {why}: name a file in a folder that is there")
    from phi3v.evaluation.compare_page import PAGE_MARK

    refuse_foreign("--out", out, PAGE_MARK, "page of phi3v compare")
    return out


def _names(runs: Sequence[str | Path]) -> list[str]:
    """Folder names, or whole paths where two have the same: ["a/one", "b/two"] -> ["one", "two"]."""
    short = [Path(run).resolve().name for run in runs]
    return short if len(set(short)) == len(runs) else [str(Path(run).resolve()) for run in runs]


def _read(path: Path) -> tuple[RunFolder, Mapping[str, Any], list[dict[str, Any]]]:
    """A run, its evaluation and predictions."""
    run = RunFolder(path)
    if run.evaluation.is_file() and not run.recipe.is_file():
        raise CheckpointError(
            f"{path} holds an evaluation apart from a run (phi3v evaluate --out), which compare does not take: name "
            "runs, evaluated on the same rows, or take phi3v evaluate RUN --against OTHER"
        )
    run.read_recipe()
    if not run.evaluation.is_file():
        raise CheckpointError(f"run {path} was not evaluated: phi3v evaluate {path}")
    evaluation, predictions = run.read_evaluation(needed=["metrics", "primary", "rows"]), run.read_predictions()
    if any("scores" not in one for one in predictions):
        raise CheckpointError(f"{run.predictions} has no scores of its rows: phi3v evaluate {path} writes it anew")
    return run, evaluation, predictions


def _row_names(predictions: Iterable[Mapping[str, Any]], depth: int) -> dict[RowName, Mapping[str, Any]]:
    """Predictions by what each row is.

    Example: depth 1 and two lines of row 7 of "x/rows.csv", both with "red" expected of x/a.jpg, as a set that is named
    twice has -> {("rows.csv", 7, "red", ("a.jpg",), 0): ..., ("rows.csv", 7, "red", ("a.jpg",), 1): ...}.
    """
    rows: dict[RowName, Mapping[str, Any]] = {}
    seen: Counter[tuple[str, int, str, tuple[str, ...]]] = Counter()
    for one in predictions:
        photos = tuple(PurePath(photo or "").name for photo in one["images"])
        name = (path_end(one["source"], depth), one["row"], one["expected"], photos)
        rows[(*name, seen[name])] = one
        seen[name] += 1
    return rows


def _facts(run: _Run, first: _Run) -> dict[str, Any]:
    """A run's entry in `Comparison.runs`."""
    told = "metric field label unit better".split()
    metrics = {
        name: {key: one[key] for key in told} | _figures(one["tuned"]) | _controls(one, run.evaluation.get("against"))
        for name, one in run.evaluation["metrics"].items()
    }
    shared = [row for row in first.rows if row in run.rows]
    tested_on, why_not = _which_rows(run, first, shared)
    return {
        "name": run.name,
        "folder": str(run.folder.path),
        "rows": run.evaluation["rows"],
        "images": run.evaluation.get("images"),
        "metrics": metrics,
        "constant_answer": (run.evaluation.get("constant") or {}).get("answer"),
        "checks": {
            name: {key: one[key] for key in ("verdict", "line", "metric") if key in one}
            for name, one in (run.evaluation.get("checks") or {}).items()
        },
        "shared_rows": len(shared),
        "beside_first": {} if why_not or run is first else _beside(run, first, shared),
        "tested_on": tested_on,
        "why_not": why_not,
    }


def _which_rows(run: _Run, first: _Run, shared: Sequence[RowName]) -> tuple[str | None, str | None]:
    """Which rows both runs answered where these are not all rows of both, or why they cannot be tested.

    Example: ("the 200 rows that both answered (of its 200 and big's 300)", None); (None, "only 3 rows were answered by
    big too (of its 200 and big's 300), so there is no test: 6 at least can tell"); all rows of both -> (None, None).
    """
    if len(shared) == len(run.rows) == len(first.rows):
        return None, None
    groups = _groups(first, shared).tolist()
    photos = [group for group, row in zip(groups, shared, strict=True) if first.rows[row]["images"]]
    images = {"rows": len(photos), "different": len(set(photos))}
    what = rows_about({"rows": len(shared), "images": images}, "row")
    whole = f"(of its {len(run.rows)} and {first.name}'s {len(first.rows)})"
    unlike = _expected_otherwise(run, first)
    if not shared:
        return None, f"no row was answered by {first.name} too {whole}, so there is no test{unlike}"
    if len(set(groups)) < LEAST_ROWS:
        few = f"only {what} {'was' if len(shared) == 1 else 'were'} answered by {first.name} too {whole}"
        return None, f"{few}, so there is no test: {LEAST_ROWS} at least can tell{unlike}"
    return f"the {what} that both answered {whole}", None


def _expected_otherwise(run: _Run, first: _Run) -> str:
    """Says how many rows are the first run's but for the expected answer, as with another template.

    Example: "; 60 rows of the same photos have other expected answers (data.answer)"; none -> "".
    """
    there = {(file, row, photos) for file, row, _, photos, _ in first.rows.keys() - run.rows.keys() if any(photos)}
    many = sum((file, row, photos) in there for file, row, _, photos, _ in run.rows.keys() - first.rows.keys())
    has = "has" if many == 1 else "have"
    return f"; {counted(many, 'row')} of the same photos {has} other expected answers (data.answer)" if many else ""


def _groups(first: _Run, rows: Sequence[RowName]) -> Groups:
    """Which of some rows belong together; each stands for itself in predictions that do not say."""
    return np.array([first.rows[row].get("image_group", place) for place, row in enumerate(rows)], np.int64)


def _figures(side: Mapping[str, Any]) -> dict[str, Any]:
    return {key: side[key] for key in ("value", "low", "high", "rows")}


def _controls(figure: Mapping[str, Any], against: str | None) -> dict[str, Any]:
    """What a score is to be held against: the base's, where it was asked, and that of one answer to all rows."""
    base = figure.get("base") if against == "base" else None
    return {"base": _figures(base) if base else None, "constant": figure.get("constant")}


def _beside(run: _Run, first: _Run, rows: Sequence[RowName]) -> dict[str, dict[str, Any]]:
    """The paired tests of a run against the first one on some rows, by metric.

    The loss is left out, whose rows have weights that predictions do not hold, and so are fields that one evaluation
    compared as numbers and the other as texts: that is decided by all its rows.
    """
    told, others = first.evaluation["metrics"], run.evaluation["metrics"]
    errors = {name: one["field"] for name, one in {**told, **others}.items() if one["metric"] == "absolute_error"}
    unlike = {field for name, field in errors.items() if (name in told) != (name in others)}
    skipped = {name for name, one in told.items() if one["metric"] == "field_accuracy" and one["field"] in unlike}
    skipped |= {"loss", *(["field_accuracy"] if skipped else [])}
    names = [name for name in told if name in others and name not in skipped]
    groups = _groups(first, rows)

    def column(its: _Run, name: str) -> Column:
        values = [its.rows[row]["scores"]["tuned"].get(name) for row in rows]
        return Column(told[name]["metric"], told[name]["field"], np.array(values, np.float64), None, groups)

    pairs = [(column(run, name), column(first, name)) for name in names]
    gaps = estimate([], pairs)[1]
    return {
        name: {
            **{key: told[name][key] for key in ("label", "unit", "better")},
            **{whose: mean(one) for whose, one in zip(("own", "first"), pair, strict=True)},
            "difference": gap.to_dict(),
            **vars(paired_test(*pair)),
        }
        for name, pair, gap in zip(names, pairs, gaps, strict=True)
    }


def _settings(run: RunFolder) -> dict[str, Any]:
    """A run's recipe and versions, flat."""
    versions = {f"versions.{name}": version for name, version in run.read_versions().items()}
    return {name: value for name, value in run.read_recipe().flat().items() if name != "output"} | versions


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not the same in all: [{"a": 1, "b": 2}, {"a": 1, "b": 3}] -> {"b": [2, 3]}."""
    found = {
        name: [one.get(name) for one in settings] for name in dict.fromkeys(name for one in settings for name in one)
    }
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _disagreements(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """The first run's rows that some of the runs that answered them got right and others did not."""
    found = []
    for row, one in runs[0].rows.items():
        its = {run.name: run.rows[row] for run in runs if row in run.rows}
        right = {name: bool(its_row["right"]) for name, its_row in its.items()}
        if len(set(right.values())) == 2:
            answers = {name: its_row["tuned"] for name, its_row in its.items()}
            named = {key: one[key] for key in ("row", "source", "images", "question", "expected")}
            found.append({**named, "answers": answers, "right": right})
    return found
