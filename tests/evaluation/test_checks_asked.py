"""Checks that ask a tiny model: who is asked what, what is written and shown, what is refused."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_models import write_photos, write_tiny_model
from tiny_runs import make_recipe, make_run

from phi3v.cli_screen import show_evaluation
from phi3v.data.schema import ImageRef, Message, Row, TextPart
from phi3v.errors import ConfigError, DataError
from phi3v.evaluation import run as running
from phi3v.evaluation.checks import ALL, default_checks
from phi3v.evaluation.run import evaluate
from phi3v.run_folder import RunFolder
from phi3v.targets import resolve_target
from phi3v.training.preflight import check_recipe_alone


def test_images_are_usual_where_rows_have_some():
    recipe = make_recipe(Path("x"))
    image, text = (ImageRef("a.png"),), (Message("user", (TextPart("What?"),)), Message("assistant", (TextPart("a"),)))
    bare, shown = (Row(text, images, {}, "made", 0) for images in ((), image))
    assert list(default_checks(recipe, [bare, shown])) == ["overlap", "form", "constant", "images"]
    assert list(default_checks(recipe, [bare])) == ["overlap", "form", "constant"]
    assert default_checks(recipe.with_overrides(["evaluation.checks=[]"]), [shown]) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run with a random adapter, 6 held-out photos of 4 colours, and 4 prompts of another task."""
    folder = tmp_path_factory.mktemp("checked")
    torch.set_num_threads(1)
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 24)
    lines = [{"image": f"{row}.png", "question": "How many?", "answer": str(row)} for row in range(4)]
    (folder / "photos" / "keep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = make_recipe(folder, evaluation={"batch_size": 4, "max_new_tokens": 3})
    keep = json.dumps(str(folder / "photos" / "keep.jsonl"))
    make_run(folder, recipe.with_overrides(["data.split.validation=6", f"evaluation.keep={keep}"]))
    return folder


def test_all_checks_of_a_run(world, monkeypatch):
    asked = []
    original = running.answer_rows

    def answer_rows(model, processor, rows, **options):
        asked.append(len(rows))
        return original(model, processor, rows, **options)

    monkeypatch.setattr(running, "answer_rows", answer_rows)
    stages = []
    found = evaluate(world / "run", checks=ALL, on_progress=lambda stage, done, total: stages.append(stage))
    assert asked == [4, 6, 6, 4, 6], "base: kept, own; tuned: grey, kept, own"
    assert set(stages) == {
        "base answers",
        "tuned answers",
        "with grey images, tuned",
        "what should be kept, base",
        "what should be kept, tuned",
    }
    checks = found.checks
    assert tuple(checks) == ALL
    assert checks["overlap"]["verdict"] == "fail" and checks["overlap"]["leaked"] == 6, (
        "photos of 4 colours are the same"
    )
    assert checks["overlap"]["looked_at"] == 18 and len(checks["overlap"]["pairs"]) == 6
    assert checks["form"]["tuned"]["formless"]["low"] > 0.6 and checks["form"]["tuned"]["cut_off"]["value"] > 0
    assert checks["constant"]["verdict"] in ("fail", "skipped") and "too few" not in checks["form"]["line"]
    assert checks["images"]["rows"] == 6 and checks["images"]["verdict"] == "fail"
    assert checks["forgetting"]["kind"] == "number" and checks["forgetting"]["before"]["rows"] == 4
    run = RunFolder(world / "run")
    assert run.read_evaluation()["checks"] == json.loads(json.dumps(checks))
    assert "leaked" not in run.report.read_text() and "are in the training data as well" in run.report.read_text()
    assert not list(run.path.glob("answers-*.jsonl"))
    console = Console(width=100, record=True, file=io.StringIO())
    show_evaluation(console, found.to_dict())
    assert "check overlap: fail: 6 of 6 rows (100 %)" in console.export_text()


def test_usual_checks_of_few_photos_ask_nothing_more_and_forgetting_comes_with_keep(world):
    asked = set()
    found = evaluate(world / "run", rows=2, against="none", on_progress=lambda stage, done, total: asked.add(stage))
    assert list(found.checks) == ["overlap", "form", "constant", "images", "forgetting"]
    assert "2 rows with images are too few" in found.checks["images"]["line"]
    assert not any("grey" in stage for stage in asked), "2 photos cannot tell, so nobody is asked"
    assert found.checks["forgetting"]["before"] is not None, "the base is asked for what should be kept alone"
    assert found.base is None and found.checks["form"]["base"] is None
    stages = set()
    bare = evaluate(world / "run", rows=2, checks=[], on_progress=lambda stage, done, total: stages.add(stage))
    assert bare.checks == {} and stages == {"base answers", "tuned answers"}


def test_a_model_that_is_no_run_has_no_training_rows(world):
    found = evaluate(world / "model", world / "run" / "recipe.yaml", rows=2, checks=["overlap", "images"])
    assert found.checks["overlap"]["verdict"] == "skipped" and "is no run" in found.checks["overlap"]["line"]
    assert found.checks["images"]["verdict"] == "skipped" and "too few" in found.checks["images"]["line"]


def test_what_cannot_be_checked_is_one_line(world):
    with pytest.raises(ConfigError, match="'blank' is no check; there are overlap, form, constant, images, forgetting"):
        evaluate(world / "run", checks=["blank"])
    recipe = make_recipe(world).with_overrides(["evaluation.keep=nowhere.jsonl"])
    with pytest.raises(ConfigError, match=r"evaluation.keep names nowhere.jsonl, which does not exist"):
        check_recipe_alone(recipe)
    with pytest.raises(ConfigError, match="evaluation.checks"):
        make_recipe(world, evaluation={"checks": ["blank"]})
    few = world / "photos" / "few.jsonl"
    few.write_text((world / "photos" / "keep.jsonl").read_text().replace("3.png", "no.png"))
    keep = f"evaluation.keep={json.dumps(str(few))}"
    refused = r"^evaluation.keep: .*few.jsonl: 1 of 4 rows cannot be used .*no.png.*at most 5% may be left out "
    refused += r"\(data.max_skipped\), none of 4: .*; or take such rows out of it"
    for how, way_out in (("data.max_skipped=0.24", r", or allow more here \(data.max_skipped=0.25\)$"), (None, "$")):
        match = refused.replace("5%", "24%") if how else r"^evaluation.keep: .*data.on_problem is stop.*out of it"
        with pytest.raises(DataError, match=match + way_out):
            evaluate(world / "run", rows=2, overrides=[keep, how or "data.on_problem=stop"])
    place = resolve_target(world / "run")
    allowed = running.kept_rows(place, make_recipe(world).with_overrides([keep, "data.max_skipped=0.25"]))
    assert [row.answer for row in allowed.rows] == ["0", "1", "2"], "what the line says goes on"
