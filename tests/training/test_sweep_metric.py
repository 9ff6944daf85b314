"""Sweeps by a metric that is to grow: whom the pruner ends, and what decides among trials of equal score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phi3v
from phi3v.cli_sweep import show_sweep
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import TrainingEvent, Watcher

pytest.importorskip("optuna", reason="sweeps need Optuna")

from rich.console import Console

from phi3v.sweep import run as sweep_module
from phi3v.sweep import trial as trial_module
from phi3v.sweep.run import SweepResult, sweep
from phi3v.sweep.verdict import ranked, remarks

SCORE = {"low": 0.0, "high": 0.5}


def sweep_of(
    make: Callable[..., phi3v.Recipe],
    monkeypatch: pytest.MonkeyPatch,
    losses: list[float],
    scores: list[float],
    **sections: Any,
) -> SweepResult:
    """A sweep by exact match whose trainings are made up: each validates once on its way, and once at its end.

    Args:
        make: makes a recipe.
        monkeypatch: for the trainings.
        losses: held-out loss of each trial, at both validations.
        scores: its exact match, likewise.
        **sections: of the recipe.
    """

    def train(recipe: Recipe, *, on_event: Watcher, **options: Any) -> None:
        run = RunFolder(recipe.output)
        run.path.mkdir(parents=True)
        loss, score = (said[int(Path(recipe.output).name)] for said in (losses, scores))
        told = {"eval_loss": loss}
        if recipe.evaluation.during_training:
            told["eval_exact_match"] = score
        for step in (1, 2):
            run.append_metrics({"step": step, **told})
            on_event(TrainingEvent("metrics", step, 2, metrics=told))
        figures = {"exact_match": score, "loss": loss}
        run.write_evaluation({"metrics": {name: {"tuned": {"value": one, **SCORE}} for name, one in figures.items()}})

    monkeypatch.setattr(trial_module, "train", train)
    monkeypatch.setattr(sweep_module, "score_untuned", lambda *args: {"value": 0.0, **SCORE})
    monkeypatch.setattr(sweep_module, "write_plots", lambda *args: [])
    section = {
        "search": {"training.seed": list(range(len(losses)))},
        "trials": len(losses),
        "metric": "exact_match",
        "pruner": {"name": "MedianPruner", "n_startup_trials": 2, "n_warmup_steps": 0},
        "storage": str(Path(make("x").output).parent / "journal.log"),
    }
    return sweep(make("by_metric", **{"data": {"split": {"validation": 4}}, "sweep": section, **sections}))


@pytest.mark.parametrize("answered", [False, True])
def test_a_pruner_ends_the_worst_by_a_metric_that_is_to_grow(
    make: Callable[..., phi3v.Recipe], monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """By the held-out loss, which is to fall, and by the metric itself; the third trial is better than those before."""
    losses, scores = ([1.0] * 4, [0.4, 0.5, 0.8, 0.1]) if answered else ([5.0, 4.0, 1.0, 9.0], [0.4, 0.5, 0.8, 0.7])
    section = {"evaluation": {"during_training": 4}} if answered else {}
    found = sweep_of(make, monkeypatch, losses, scores, **section)
    assert {line["trial"]: line["state"] for line in found.ranking["trials"]} == {
        0: "complete",
        1: "complete",
        2: "complete",
        3: "pruned",
    }
    assert [line["trial"] for line in found.ranking["trials"]] == [2, 1, 0, 3]
    assert found.ranking["trials"][0]["validations"] == ({"1": 0.8, "2": 0.8} if answered else {"1": 1.0, "2": 1.0})


def test_the_held_out_loss_decides_among_trials_of_equal_score(
    make: Callable[..., phi3v.Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sweep_of(make, monkeypatch, [8.7, 6.6, 1.25, 1.75], [0.0, 0.0, 0.0, 0.0])
    ranking = found.ranking
    assert [(line["trial"], line["loss"]) for line in ranking["trials"]] == [(2, 1.25), (3, 1.75), (1, 6.6), (0, 8.7)]
    equal = "4 trials have the best exact_match, 0: trial 2 stands first by its held-out loss, 1.25 (the next one's is "
    assert ranking["best"] == 2 and ranking["remarks"][1] == f"{equal}1.75)" and found.best_recipe is not None
    head = found.best_recipe.read_text(encoding="utf-8")
    assert head.startswith("# The best of 4 complete trials: trial 2, ") and f"# {equal}1.75)" in head
    table = (found.folder / "ranking.csv").read_text(encoding="utf-8").splitlines()
    assert table[0].split(",")[:7] == ["rank", "trial", "state", "value", "low", "high", "loss"]
    assert table[1].startswith("1,2,complete,0.0,0.0,0.5,1.25,")
    show_sweep(Console(width=80), found)
    said = capsys.readouterr().out
    assert "held-out loss" in said and "1.75" in said and "stands first by its held-out loss" in said


def test_equal_in_all_the_lower_number_is_first() -> None:
    def line(trial: int, value: float | None, loss: float | None = None, state: str = "complete") -> dict[str, Any]:
        line = {"trial": trial, "state": state, "value": value, "loss": loss, "low": None, "high": None, "folder": "t"}
        return {**line, "validations": {str(place): 1.0 for place in range(1, 3 + trial)}}

    lines = [line(4, 0.5, 2.0), line(1, 0.5, 2.0), line(2, 0.5), line(3, 0.4, 0.1), line(5, None, state="pruned")]
    lines += [line(6, None, state="pruned")]
    states = ["complete", "pruned"]
    for minimize, order in ((False, [1, 4, 2, 3, 6, 5]), (True, [3, 1, 4, 2, 6, 5])):
        assert [one["trial"] for one in ranked(lines, minimize, states)] == order
    for metric, name in (("exact_match", "exact_match"), ("eval_loss", "held-out loss")):
        said = remarks({"metric": metric, "better": "higher", "base": None, "trials": ranked(lines, False, states)})
        first = "trial 1 stands first as the one with the lowest number"
        assert said[1] == f"3 trials have the best {name}, 0.5: {first}"
