"""A run on disk: states, refusals, and files that are whole or absent whatever happens while they are written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi3v.errors import CheckpointError, ConfigError
from phi3v.plain_json import to_json
from phi3v.recipe import Recipe
from phi3v.run_folder import OPTIONAL_PACKAGES, VERSIONED_PACKAGES, RunFolder, gather_versions
from phi3v.targets import resolve_target
from phi3v.whole_files import replace_file, replace_folder


def recipe(*overrides: str) -> Recipe:
    return Recipe.from_dict({"model": "some/name", "data": "rows.csv"}, overrides)


def test_a_run_goes_from_new_to_finished(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "deep" / "run")
    assert (run.state(), RunFolder.is_run(run.path)) == ("new", False)
    assert run.start(recipe()) == "new"
    assert (run.state(), RunFolder.is_run(run.path)) == ("unfinished", True)
    assert run.read_recipe() == recipe(f"output={run.path}")
    assert run.start(recipe()) == "unfinished"
    run.mark_finished({"steps": 3})
    assert (run.state(), run.start(recipe())) == ("finished", "finished")
    assert run.read_summary() == {"steps": 3}
    assert sorted(path.name for path in run.path.iterdir()) == [
        "finished.json",
        "recipe.yaml",
        "run.lock",
        "versions.json",
    ]


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    for name in ("a.jpg", "versions.json"):
        (foreign / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"photos holds a\.jpg and is no run of phi3v: give a folder that is new"):
        RunFolder(foreign).start(recipe())
    assert {path.name: path.read_text() for path in foreign.iterdir()} == {"a.jpg": "mine", "versions.json": "mine"}
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(foreign / "a.jpg").start(recipe())
    with pytest.raises(ConfigError, match="cannot be used"):
        RunFolder(foreign / "a.jpg" / "below").start(recipe())


def test_a_run_that_lost_its_versions_is_told_what_it_lacks(tmp_path: Path) -> None:
    """Also a copy, whose recipe names the folder of the other: that one is not opened in its place."""
    RunFolder(tmp_path / "run").start(recipe(f"output={tmp_path / 'run'}"))
    run = RunFolder(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    run.append_metrics({"step": 1, "loss": 2.5})
    run.versions.unlink()
    lacks = f"{run.path} holds recipe.yaml and no versions.json, and a run has both: bring versions.json back"
    with pytest.raises(CheckpointError, match=f"^{re.escape(lacks)}, or name the folder adapter or model in it"):
        resolve_target(run.path)
    again = Recipe.load(run.recipe)
    assert again.output == str(run.path)
    with pytest.raises(ConfigError, match=f"^output {re.escape(lacks)} to go on with it, or give a folder"):
        run.look(again)


def test_an_empty_folder_and_what_a_killed_start_left_are_taken(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).start(recipe()) == "new"
    (tmp_path / "versions.json").unlink()
    (tmp_path / ".recipe.yaml.123.tmp").write_text("half")
    assert RunFolder(tmp_path).start(recipe()) == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "run.lock", "versions.json"]
    (tmp_path / "versions.json").unlink()
    with pytest.raises(ConfigError, match=r"holds recipe\.yaml and is no run"):
        RunFolder(tmp_path).start(recipe("training.seed=5"))


def test_resuming_with_another_recipe_names_the_keys(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.start(recipe("training.seed=1"))
    run.append_metrics({"step": 1, "loss": 2.0})
    before = run.recipe.read_bytes()
    with pytest.raises(ConfigError) as caught:
        run.start(recipe("training.seed=2", "lora.r=4"))
    line = str(caught.value)
    assert "lora.r: 4 here, 16 there; training.seed: 2 here, 1 there" in line and "give another output" in line
    assert run.recipe.read_bytes() == before
    assert run.start(recipe("training.seed=1", "output=moved")) == "unfinished"


def test_a_run_is_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop" / "model").mkdir(parents=True)
    (tmp_path / "shop" / "rows.csv").write_text("a\n1\n")
    monkeypatch.chdir(tmp_path / "shop")
    started = Recipe.from_dict({"model": "model", "data": "rows.csv", "output": "run"}, ["data.validation=some/hub"])
    RunFolder("run").start(started)
    assert RunFolder("run").start(started) == "unfinished"
    RunFolder("run").checkpoints.joinpath("checkpoint-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = RunFolder("shop/run").read_recipe()
    assert (found.model.name, found.data.train) == (str(tmp_path / "shop/model"), str(tmp_path / "shop/rows.csv"))
    assert (found.data.validation, found.data.image_root, found.output) == (
        "some/hub",
        None,
        str(tmp_path / "shop/run"),
    )
    again = started.with_overrides(["model=shop/model", "data.train=shop/rows.csv"])
    assert RunFolder("shop/run").start(again) == "unfinished"
    with pytest.raises(ConfigError, match=r"model.name: 'model' here, '.*/shop/model' there"):
        RunFolder("shop/run").start(started)


def test_a_run_that_has_nothing_to_show_yields_to_a_mended_recipe(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.start(recipe("data.answer='{titel}'"))
    run.checkpoints.mkdir()
    assert run.start(recipe()) == "new"
    assert run.read_recipe().data.answer != "{titel}"
    assert run.start(recipe()) == "unfinished"
    (run.checkpoints / "checkpoint-1").mkdir()
    with pytest.raises(ConfigError, match="another recipe"):
        run.start(recipe("training.seed=2"))


def test_a_runs_own_recipe_means_the_run_wherever_it_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunFolder("runs/run").start(recipe("output=runs/run"))
    assert f"output: {tmp_path}/runs/run\n" in (tmp_path / "runs/run/recipe.yaml").read_text()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs/run").rename(tmp_path / "elsewhere/moved")
    for here, path in (("elsewhere", "moved/recipe.yaml"), ("elsewhere/moved", "recipe.yaml")):
        monkeypatch.chdir(tmp_path / here)
        found = Recipe.load(path)
        assert found.output == str(tmp_path / "elsewhere/moved")
        assert RunFolder(found.output).start(found) == "unfinished"
        assert Recipe.load(path, ["output=new"]).output == "new"
    (tmp_path / "recipe.yaml").write_text("model: some/name\ndata: rows.csv\n")
    assert Recipe.load(tmp_path / "recipe.yaml").output == "runs/recipe"  # no run lies there


def test_a_look_writes_nothing(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "deep" / "run").look(recipe()) == "new"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"run cannot be used \(.*/file is a file\): give another folder"):
        RunFolder(tmp_path / "file" / "run").look(recipe())


def test_values_that_change_no_training_are_taken(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.start(recipe())
    run.checkpoints.joinpath("checkpoint-1").mkdir(parents=True)

    def made() -> list[str]:
        return [path.name for path in (run.evaluation, run.predictions, run.report) if path.is_file()]

    def call(*overrides: str) -> list[str]:
        run.write_evaluation({})
        run.write_predictions([])
        run.write_report("")
        assert run.start(recipe(*overrides)) == "unfinished"
        found = run.read_recipe()
        assert found.differences(recipe(*overrides)) == [] and found.output == str(run.path)
        return made()

    everything = ["evaluation.json", "predictions.jsonl", "report.html"]
    assert call() == everything
    device = ["model.device=cpu", "data.allow_hosts=[a.example]", "data.image_cache=cache", "vision.cache_gb=1.5"]
    device += ["training.dataloader_num_workers=2", "training.save_total_limit=1"]
    assert call(*device) == everything
    assert call(*device, "report.samples=3") == ["evaluation.json", "predictions.jsonl"]
    assert call(*device, "report.samples=3", "evaluation.rows=2") == []
    with pytest.raises(ConfigError, match=r"another recipe \(training.seed: 3 here, 0 there\)"):
        run.start(recipe("evaluation.rows=4", "training.seed=3"))
    assert run.read_recipe().evaluation.rows == 2


def test_metrics_are_lines_without_nan(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_metrics() == []
    run.append_metrics({"step": 1, "loss": float("nan"), "rate": float("-inf"), "note": "é"})
    run.append_metrics({"step": 2, "loss": 0.5})
    assert run.metrics.read_text() == '{"step": 1, "loss": null, "rate": null, "note": "é"}\n{"step": 2, "loss": 0.5}\n'


def test_a_half_line_is_dropped_when_read_and_when_the_run_goes_on(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    with open(run.metrics, "a") as file:
        file.write('{"step": 2, "lo')
    assert run.read_metrics() == [{"step": 1}]
    run.append_metrics({"step": 2})
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]
    run.metrics.write_text('{"st')
    run.append_metrics({"step": 7})
    assert run.read_metrics() == [{"step": 7}]


def test_metrics_behind_a_checkpoint_are_dropped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.keep_metrics(3)
    assert not run.metrics.exists()
    for step in (5, 10, 15):
        run.append_metrics({"step": step})
    run.append_metrics({"event": "resumed"})
    run.keep_metrics(10)
    assert run.read_metrics() == [{"step": 5}, {"step": 10}, {"event": "resumed"}]
    known = [
        {"step": 20, "left_out": "loss is nan"},
        {"step": 20, "loss": 1},
        {"step": 20, "answers": []},
        {"step": 20, "eval_loss": 2},
    ]
    for line in known:
        run.append_metrics(line)
    run.keep_metrics(20, 2)
    assert run.read_metrics()[-4:] == known
    run.keep_metrics(20, 1)
    assert run.read_metrics()[-2:] == known[:2], "a checkpoint knows nothing of its step being left out"


def test_scores_predictions_and_report_come_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for read in (run.read_predictions, run.read_evaluation, run.read_summary, run.read_recipe):
        with pytest.raises(CheckpointError):
            read()
    rows = [{"row": 0, "answer": "a\nb\u2028c"}, {"row": 1, "answer": ""}]
    run.write_predictions(rows)
    run.write_evaluation({"exact_match": 1.0, "path": Path("a")})
    run.write_report("<p>é</p>")
    assert run.read_predictions() == rows
    assert run.read_evaluation() == {"exact_match": 1.0, "path": "a"}
    assert run.report.read_text(encoding="utf-8") == "<p>é</p>"
    run.evaluation.write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluation\.json cannot be read"):
        run.read_evaluation()
    run.predictions.write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(CheckpointError, match="line 2: not JSON"):
        run.read_predictions()


def test_json_takes_scalars_of_numpy_and_torch_and_refuses_the_rest() -> None:
    import numpy
    import torch

    values = {"a": numpy.float32(0.5), "b": torch.tensor(2), "c": numpy.float64("nan"), "d": (1, True, None), 3: "x"}
    assert json.loads(to_json(values)) == {"a": 0.5, "b": 2, "c": None, "d": [1, True, None], "3": "x"}
    with pytest.raises(TypeError, match="cannot hold a set"):
        to_json({"a": {1}})
    with pytest.raises(TypeError, match="cannot hold a Tensor"):
        to_json({"a": torch.zeros(2)})


def test_versions_name_what_computes(tmp_path: Path) -> None:
    versions = gather_versions()
    assert set(versions) - set(OPTIONAL_PACKAGES) == {"python", "platform", *VERSIONED_PACKAGES}
    assert None not in [versions.get(name, "") for name in OPTIONAL_PACKAGES], "of those that are installed alone"
    assert versions["python"] == sys.version.split()[0]
    run = RunFolder(tmp_path)
    run.write_versions(versions)
    assert run.read_versions() == versions


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_adapter(lambda folder: (folder / "weights").write_text("old"))

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.write_adapter(fail)
    assert (run.adapter / "weights").read_text() == "old"
    run.write_adapter(lambda folder: (folder / "other").write_text("new"))
    assert sorted(path.name for path in run.adapter.iterdir()) == ["digests.json", "other"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_between_two_renames_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".adapter.old.tmp").mkdir()
    (tmp_path / ".adapter.old.tmp" / "weights").write_text("old")

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(tmp_path / "adapter", fail)
    assert (tmp_path / "adapter" / "weights").read_text() == "old"


def test_a_killed_writer_leaves_whole_files(tmp_path: Path) -> None:
    """A process that rewrites evaluation.json and appends metrics without pause is killed ten times."""
    run = RunFolder(tmp_path / "run")
    run.start(recipe())
    program = (
        "import sys; from phi3v.run_folder import RunFolder\n"
        "run = RunFolder(sys.argv[1]); number = 0\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    number += 1\n"
        "    run.write_evaluation({'number': number, 'filler': [number] * 20000})\n"
        "    run.append_metrics({'step': number, 'filler': [number] * 2000})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src")}
    for kill in range(10):
        writer = subprocess.Popen(
            [sys.executable, "-c", program, str(run.path)], stdout=subprocess.PIPE, env=environment
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        while not run.evaluation.is_file():
            time.sleep(0.001)
        time.sleep(0.003 * kill)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        found = run.read_evaluation()
        assert found["filler"] == [found["number"]] * 20000
        assert all(line["filler"] == [line["step"]] * 2000 for line in run.read_metrics())
