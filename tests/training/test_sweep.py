"""Sweeps on a tiny model: what is tried, what is shared, and that a killed sweep ends as an undisturbed one."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import phi3v
from phi3v.cli import app
from phi3v.cli_sweep import trial_line
from phi3v.data import encode as encode_module
from phi3v.errors import ConfigError, DataError, Interrupted, TrainingError
from phi3v.evaluation.figures import short_number
from phi3v.evaluation.run import evaluate
from phi3v.first_look import open_data
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import TrainingEvent

pytest.importorskip("optuna", reason="sweeps need Optuna")

from optuna.trial import TrialState

from phi3v.sweep import run as sweep_module
from phi3v.sweep.folder import SweepFolder
from phi3v.sweep.run import SweepResult, TrialNews, sweep
from phi3v.sweep.space import default_space, search_space, with_values
from phi3v.sweep.study import SweepStudy
from phi3v.sweep.trial import _found, rows_of
from phi3v.sweep.verdict import remarks

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


def file_of(recipe: phi3v.Recipe) -> Path:
    """The sweep's own copy of its recipe."""
    return Path(recipe.output) / "sweep.yaml"


def test_a_sweep_ranks_its_trials_and_a_killed_one_ends_as_an_undisturbed_one(
    make_sweep: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert best["validations"].keys() == {"1", "2"} and best["validations"]["2"] == best["value"]
    last = [line for line in run.read_metrics() if "eval_loss" in line][-1]
    assert (best["low"], best["high"]) == (last["eval_loss_low"], last["eval_loss_high"])
    assert best["low"] < best["value"] < best["high"]
    assert not run.checkpoints.exists()
    table = (run.path.parent.parent / "ranking.csv").read_text().splitlines()
    assert table[0] == ",".join(
        ["rank", "trial", "state", "value", "low", "high", "loss", "steps", "seconds", "error", *SEARCH]
    )
    base = whole.ranking["base"]
    assert base["rows"] == 4 and base["low"] < base["value"] < base["high"]
    assert table[-1].startswith(f",,base,{base['value']},{base['low']},") and len(table) == 5
    untuned = evaluate(recipe.model.name, file_of(recipe), against=None).metrics["loss"]["tuned"]
    assert [base[name] for name in ("value", "low", "high")] == pytest.approx(
        [untuned[name] for name in ("value", "low", "high")], rel=1e-5
    )
    chosen, ahead, beside = whole.ranking["remarks"]
    assert f"trial {best['trial']} was chosen as the best of 3" in chosen and "on rows that no trial saw" in chosen
    assert "first and second" in ahead and "the base" in beside
    head = whole.best_recipe.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert all(f"# {line}" in head for line in whole.ranking["remarks"]) and "95 %: " in head
    assert head.startswith("# The best of 3 complete trials: ")
    written = Recipe.load(whole.best_recipe)
    assert (written.training.learning_rate, written.lora["r"]) == tuple(best["values"].values())
    assert (
        written.sweep is None
        and written.evaluation == recipe.evaluation
        and Path(written.output) == run.path.absolute()
    )
    assert {plot.stem for plot in whole.plots} >= {"history", "slice", "curves"}
    stored = SweepStudy(SweepFolder(recipe.output), Recipe.load(file_of(recipe)), recipe.sweep, search_space(recipe))
    assert [[*one.intermediate_values] for one in stored.trials()] == [[1]] * 3, (
        "the pruner is not told of the last one"
    )
    monkeypatch.setattr(sweep_module, "score_untuned", lambda *args: pytest.fail("the base is asked once"))
    assert sweep(recipe).status == "finished"
    whole.best_recipe.unlink()  # as a kill leaves it between the last trial and the end
    assert sweep(recipe).status == "complete" and whole.best_recipe.is_file()
    monkeypatch.undo()

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
    assert plain(ended) == plain(whole) and ended.ranking["base"] == base
    more = sweep(make_sweep("killed", trials=4))
    assert more.status == "complete" and [line for line in plain(more) if line["trial"] < 3]
    with pytest.raises(ConfigError, match=r"holds a sweep of another recipe \(training.epochs"):
        sweep(make_sweep("killed", training={"epochs": 3}))
    refuse_other_rows(make_sweep("killed", trials=5), make_sweep("killed", trials=4))


def test_what_is_drawn_together_follows_from_the_trials_alone(make_sweep: MakeRecipe) -> None:
    """Two sweeps of one recipe, whose second trials on have both keys from one draw, get the same values."""

    def drawn(name: str) -> list[dict[str, Any]]:
        sampler = {"name": "TPESampler", "multivariate": True, "n_startup_trials": 1}
        recipe = make_sweep(name, sampler=sampler, trials=4)
        study = SweepStudy(SweepFolder(recipe.output), recipe, recipe.sweep, search_space(recipe))
        found = []
        while (own := study.next()) is not None:
            assert bool(own.trial.relative_params) == bool(found)
            found.append(own.trial.params)
            study.done(own, float(len(found)), TrialState.COMPLETE)
        return found

    assert drawn("one") == drawn("two")


def refuse_other_rows(more: phi3v.Recipe, ended: phi3v.Recipe) -> None:
    """A sweep goes on with the rows and photos that its trials had; one that has ended looks at none.

    Args:
        more: of a sweep that has trials and wants one more.
        ended: the same of one that wants none.
    """
    table = Path(more.data.train)
    photo = table.parent / open_data(more).validation[0].images[0].path
    kept = {file: file.read_bytes() for file in (table, photo)}
    changes = {table: kept[table].replace(b'"colour": "', b'"colour": "dark '), photo: kept[photo] + b"x"}
    for file in (table, photo):  # a photo's contents say where its row is held out too
        file.write_bytes(changes[file])
        with pytest.raises(ConfigError, match="^the training rows are not those that sweep .*killed was trained with:"):
            sweep(more, on_trial=lambda one: pytest.fail("a trial began"))
        assert sweep(ended).status == "finished"
        file.write_bytes(kept[file])
    assert sweep(more).ranking["states"] == {"complete": 5}


def test_what_is_worse_is_pruned_and_what_cannot_be_fails(make_sweep: MakeRecipe) -> None:
    """A threshold that no tiny model passes prunes at the first validation; samples of a step that micro-batches do not
    divide are a failed trial with its line, and so is what a training refuses."""
    pruner = {"name": "ThresholdPruner", "upper": 0.01}
    search = {"training.samples_per_step": [3, 4], "training.optim": ["adamw_torch", "nothing"]}
    told: list[str] = []
    made = make_sweep("grid", search=search, trials=9, pruner=pruner, sampler="GridSampler")
    result = sweep(made, on_trial=lambda news: told.append(trial_line(news)))
    lines = {tuple(line["values"].values()): line for line in result.ranking["trials"]}
    assert result.status == "complete" and len(result.ranking["trials"]) == len(lines) == 4  # the grid was all tried
    assert result.ranking["states"] == {"pruned": 1, "failed": 3} and result.best_recipe is None
    pruned = lines[4, "adamw_torch"]
    run = RunFolder(pruned["folder"])
    assert (pruned["steps"], list(pruned["validations"]), pruned["value"]) == (2, ["1"], None)
    score = f", {short_number(pruned['validations']['1'])} at its last validation; "
    assert sum(score in line for line in told if ": pruned after" in line) == 1
    assert run.state() == "unfinished" and not run.checkpoints.exists() and not run.has_weights()
    assert [line["eval_loss"] for line in run.read_metrics() if "eval_loss" in line] == [pruned["validations"]["1"]]
    assert "no multiple of training.micro_batch_size" in lines[3, "adamw_torch"]["error"]
    assert "training.optim is 'nothing'" in lines[4, "nothing"]["error"]


def test_spaces_and_slips(make_sweep: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_sweep("slips", search=None)
    space = default_space(recipe)
    assert list(space) == [
        "training.learning_rate",
        "training.samples_per_step",
        "lora.r",
        "lora.target_modules",
        "training.epochs",
        "image.num_crops",
    ]
    assert search_space(recipe) == space
    together = {"size": {"lora.r": 8, "lora.lora_alpha": 16}, "lora.target_modules": ["o_proj"]}
    assert with_values(recipe, together).lora | {} == {
        **recipe.lora,
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["o_proj"],
    }
    monkeypatch.setitem(sys.modules, "cmaes", None)  # as where it is not installed
    nested = recipe.with_overrides(["sweep.search={lora: {r: [2, 4]}, training.seed: {low: 0, high: 3}}"])
    assert list(nested.sweep.search) == ["lora.r", "training.seed"] and nested.sweep.search["training.seed"].whole
    for override, line in (
        ("sweep.search={training.learning_rat: [1]}", "sweep.search.training.learning_rat: "),
        ("sweep.search={output: [a, b]}", "cannot be searched"),
        ("sweep.sampler=TPE", "sweep.sampler is 'TPE', Optuna has BruteForceSampler"),
        (
            "sweep.sampler={name: CmaEsSampler, n_startup_trials: 9}",
            "sweep.sampler CmaEsSampler needs a package that is not here .*: pip install cmaes",
        ),
        ("sweep.sampler={name: TPESampler, n_startup_trials: x}", "sweep.sampler TPESampler: '<' not supported"),
        ("sweep.pruner={name: MedianPruner, n_startup: 1}", "did you mean n_startup_trials"),
        ("sweep.storage=nothing://x", "sweep.storage nothing://x cannot be opened"),
        ("data.split=null", "held-out rows"),
    ):
        with pytest.raises(ConfigError, match=line):
            sweep(make_sweep("slips").with_overrides([override]))
    failing = make_sweep("failing", search={"vision.tower": ["lora"], "lora": [None]}, trials=2)
    with pytest.raises(TrainingError, match=r"all 2 trials failed, the last one so: vision.tower asks for LoRA"):
        sweep(failing)

    unread = make_sweep("unread").with_overrides([f"data.image_root={tmp_path}"])
    with pytest.raises(DataError, match="rows cannot be used .* image_path"):
        sweep(unread, on_trial=lambda one: pytest.fail("a trial began"))
    assert rows_of(unread, lambda event: None, ["lora.r", "data.image_root"]) == {}, "a trial may have others"


def test_trials_open_no_image_again(make_sweep: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first trial opens each image once; the second one, of other values and another answer, none at all."""
    opened: list[Any] = []
    original = encode_module.open_image
    monkeypatch.setattr(
        encode_module, "open_image", lambda image, **how: opened.append(image) or original(image, **how)
    )
    news: list[tuple[int, int]] = []
    recipe = make_sweep("shared", search={"lora.r": [2, 4], "data.answer": ["{colour}", "It is {colour}."]}, trials=2)
    found = sweep(recipe, on_trial=lambda one: news.append((one.number, len(opened))))
    assert found.ranking["base"] == {"error": "trials differ in data.answer, so there is no one base"}
    assert "no one base" in found.ranking["remarks"][-1] and sweep(recipe).status == "finished"
    assert news == [(0, 0), (0, 10), (1, 10), (1, 10)]
    trial = Recipe.load(RunFolder(Path(recipe.output) / "trials" / "0001").recipe)
    assert trial.vision.cache == "memory"
    alone = trial.with_overrides([f"output={Path(recipe.output).parent / 'alone'}"])
    phi3v.train(alone, report=False)
    losses = [
        [
            {name: line[name] for name in ("step", "loss", "eval_loss") if name in line}
            for line in run.read_metrics()
            if {"loss", "eval_loss"} & set(line)
        ]
        for run in (RunFolder(alone.output), RunFolder(trial.output))
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_the_command_shows_a_line_a_trial_and_says_what_is_missing(
    make_sweep: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_sweep("command", search={"lora.r": [2, 3]}, trials=2, metric="similarity", sampler="GridSampler")
    file = Path(recipe.output).with_suffix(".yaml")
    file.write_text("\n".join(line for line in recipe.to_yaml().splitlines() if not line.startswith("output:")))
    monkeypatch.chdir(file.parent)
    said = CliRunner().invoke(app, ["sweep", str(file)])
    assert said.exit_code == 0, said.output
    for line in (
        "trial 0: begins with lora.r=",
        "trial 1: complete, ",
        "; 2 of 2 done, best ",
        "is finished: 2 trials",
    ):
        assert line in said.output
    ranking = json.loads((file.parent / "runs" / "command_sweep" / "ranking.json").read_text(encoding="utf-8"))
    scores = [line["value"] for line in ranking["trials"]]
    assert ranking["better"] == "higher" and scores == sorted(scores, reverse=True)
    told = RunFolder(ranking["trials"][0]["folder"]).read_evaluation()
    score = told["metrics"]["similarity"]["tuned"]
    assert [score[name] for name in ("value", "low", "high")] == [
        ranking["trials"][0][name] for name in ("value", "low", "high")
    ]
    assert told["base"] is None and ranking["base"]["rows"] == score["rows"] == 4
    rows = [line for line in said.output.splitlines() if " to " in line and not line.startswith("trial")]
    assert len([line for line in rows if "base" in line]) >= 1, "the base stands in the table, with its interval"
    assert "phi3v compare " in said.output or "differ beyond chance" in said.output
    monkeypatch.setattr("phi3v.cli_sweep.find_spec", lambda name: None)
    said = CliRunner().invoke(app, ["sweep", str(file)])
    assert said.exit_code == 1 and 'a sweep needs Optuna: pip install "phi3v[sweep]"' in said.output


def test_what_is_said_of_a_ranking() -> None:
    def line(
        trial: int, value: float, low: float | None, high: float | None, state: str = "complete"
    ) -> dict[str, Any]:
        return {"trial": trial, "state": state, "value": value, "low": low, "high": high, "folder": f"t/{trial}"}

    def said(base: dict[str, Any] | None, *lines: dict[str, Any], better: str = "lower") -> list[str]:
        metric = "eval_loss" if better == "lower" else "anls"
        return remarks({"metric": metric, "better": better, "base": base, "trials": list(lines)})

    base = {"value": 2.0, "low": 1.5, "high": 2.5}
    assert said(base, line(0, 1.0, 0.9, 1.1, "pruned")) == [] == said(None, line(0, 1.0, 0.9, 1.1))
    cut = said(None, line(1, 1.0, 0.9, 1.1), line(0, 1.0, 0.9, 1.1, "pruned"))
    assert len(cut) == 1 and cut[0].startswith("trial 1 was chosen as the best of 2 on"), "pruning is a choice too"
    near = said(base, line(4, 1.0, 0.9, 1.2), line(2, 1.1, 1.0, 1.3), line(3, 9.0, 8.0, 9.5))
    assert near[0].startswith("trial 4 was chosen as the best of 3 on these held-out rows")
    assert near[1] == (
        "trials 4 and 2, first and second: nothing shows that they differ, 1 (0.9 to 1.2) and 1.1 (1 to 1.3), their "
        "intervals overlap, which says less than a paired test"
    )
    assert near[2] == (
        "trial 4 beats the base beyond chance: 1 (0.9 to 1.2) against 2 (1.5 to 2.5), intervals that do not overlap"
    )
    far = said(base, line(4, 0.9, 0.8, 0.95), line(2, 0.5, 0.4, 0.6), better="higher")
    assert far[1].startswith("trials 4 and 2, first and second, differ beyond chance: ")
    assert far[2].startswith("the base beats trial 4, the best one, beyond chance: ")
    unsure = said(base, line(4, 1.8, 1.4, 2.2), line(2, 1.7, None, None), better="higher")
    assert "one of them has no interval; phi3v compare t/4 t/2 tests them row by row" in unsure[1]
    assert unsure[2].startswith("nothing shows that trial 4 beats the base: ")
    assert unsure[2].endswith("a paired test; phi3v evaluate t/4 makes one, row by row")
    assert said({"error": "gone"}, line(0, 1.0, 0.9, 1.1)) == ["the base has no score to compare with: gone"]


@pytest.mark.parametrize(("kept", "loss"), [(2, 0.5), (6, 0.4), (7, 0.4)])
def test_a_trial_counts_with_the_loss_of_the_weights_that_it_keeps(tmp_path: Path, kept: int, loss: float) -> None:
    """The best by another score have a higher loss; a last step that was not validated has the last one before it."""
    run = RunFolder(tmp_path)
    for step, held_out in ((2, 0.5), (4, 0.3), (6, 0.4)):
        run.append_metrics({"step": step, "eval_loss": held_out, "eval_loss_low": held_out - 0.1})
    run.mark_finished({"kept": {"step": kept}})
    assert _found(run, "eval_loss") == {"value": loss, "low": loss - 0.1, "high": None}
