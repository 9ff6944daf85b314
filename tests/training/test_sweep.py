"""Sweeps on a tiny model: what is tried, what is shared, and that a killed sweep ends as an undisturbed one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phi3v
from phi3v.errors import ConfigError, Interrupted, TrainingError
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import TrainingEvent

pytest.importorskip("optuna", reason="sweeps need Optuna")

from phi3v.sweep.run import SweepResult, TrialNews, sweep
from phi3v.sweep.space import default_space, search_space, with_values

MakeRecipe = Callable[..., phi3v.Recipe]
SEARCH = {"training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "lora.r": [2, 4]}
QUICK = {"epochs": 2, "micro_batch_size": 4}


@pytest.fixture
def make_sweep(make: MakeRecipe) -> MakeRecipe:
    """Makes a recipe of a sweep of two steps a trial; keywords are of its section `sweep`."""

    def made(name: str, training: dict[str, Any] | None = None, **settings: Any) -> phi3v.Recipe:
        section = {"search": SEARCH, "trials": 3, "pruner": None, **settings}
        rows = {"split": {"validation": 4}}
        return make(name, data=rows, training={**QUICK, **(training or {})}, sweep=section)

    return made


def plain(result: SweepResult) -> list[dict[str, Any]]:
    """What a sweep found, without times and places."""
    return [{key: line[key] for key in line if key not in ("seconds", "folder")} for line in result.ranking["trials"]]


def test_a_sweep_ranks_its_trials_and_a_killed_one_ends_as_an_undisturbed_one(make_sweep: MakeRecipe) -> None:
    """Killed between two trials, in a trial's second epoch, and while a trial's values are stored."""
    news: list[TrialNews] = []
    recipe = make_sweep("whole")
    whole = sweep(recipe, on_trial=news.append)
    assert whole.status == "complete" and whole.ranking["states"] == {"complete": 3}
    assert [one.state for one in news] == ["running", "complete"] * 3
    values = [line["value"] for line in whole.ranking["trials"]]
    assert values == sorted(values) and len(set(values)) == 3
    best = whole.ranking["trials"][0]
    run = RunFolder(best["folder"])
    assert best["value"] == [line["eval_loss"] for line in run.read_metrics() if "eval_loss" in line][-1]
    assert best["validations"].keys() == {"1"} and not run.checkpoints.exists()  # the last one decides nothing
    written = Recipe.load(whole.best_recipe)
    assert (written.training.learning_rate, written.lora["r"]) == tuple(best["values"].values())
    assert (
        written.sweep is None
        and written.evaluation == recipe.evaluation
        and Path(written.output) == run.path.absolute()
    )
    assert {plot.stem for plot in whole.plots} >= {"history", "slice", "curves"}
    assert sweep(recipe).status == "finished"

    killed = make_sweep("killed")

    def stop_at(step: int) -> Callable[[TrainingEvent], None]:
        def watch(event: TrainingEvent) -> None:
            if event.kind == "step" and event.step == step:
                raise Interrupted(15)

        return watch

    first: list[TrialNews] = []

    def stop_between(one: TrialNews) -> None:
        first.append(one)
        if one.state == "complete":
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        sweep(killed, on_trial=stop_between)
    with pytest.raises(Interrupted):
        sweep(killed, on_event=stop_at(4))
    again: list[TrialNews] = []
    ended = sweep(killed, on_trial=again.append)
    assert (again[0].number, again[0].state, again[0].resumed) == (1, "running", True)
    assert plain(ended) == plain(whole)
    more = sweep(make_sweep("killed", trials=4))
    assert more.status == "complete" and [line for line in plain(more) if line["trial"] < 3]
    with pytest.raises(ConfigError, match=r"holds a sweep of another recipe \(training.epochs"):
        sweep(make_sweep("killed", training={"epochs": 3}))
