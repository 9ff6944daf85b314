"""The story of `phi3v demo`: in short with an untrained model and few products, and whole, as a newcomer sees it."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_models import write_tiny_model

from phi3v.cli_screen import show_demo
from phi3v.demo.catalogue import write_catalogue
from phi3v.demo.run import demo_recipe, run_demo, shuffle_answers
from phi3v.errors import ConfigError

SHORT = ["training.max_steps=2", "evaluation.max_new_tokens=4", "report.samples=2", "evaluation.rows=6"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A demo of a moment: few products, an untrained model, two steps. What was said, and what came back."""
    folder = tmp_path_factory.mktemp("demo")
    torch.set_num_threads(1)
    (folder / "demo.json").write_text("{}")  # as a demo that was stopped after painting
    write_catalogue(folder / "products", train=16, test=8)
    overrides = [f"model.name={json.dumps(str(write_tiny_model(folder / 'model')))}", *SHORT]
    said: list[str] = []
    return folder, said, run_demo(folder, overrides=overrides, say=said.append), overrides


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_figure_of_the_story_is_there(short):
    folder, said, story, _ = short
    assert story["evaluation"]["rows"] == 6 and set(story["evaluation"]["scores"]) == {"base", "tuned"}
    assert list(story["controls"]) == [
        "most frequent answer to everything",
        "pictures blanked",
        "pictures swapped",
        "pictures swapped, judged by the picture shown",
        "tuned on shuffled answers",
    ]
    assert all(0 <= share["hits"] <= share["total"] == 6 for share in story["controls"].values())
    assert list(story["evaluation"]["checks"]) == ["overlap", "form", "constant", "images", "forgetting"]
    assert story["evaluation"]["checks"]["forgetting"]["rows"] == 24
    assert story["shuffled_checks"]["images"]["verdict"] == "fail", "it was not tuned at all"
    assert len(story["samples"]) == 3 and story["seconds"] > 0 and len(said) >= 4
    assert json.loads((folder / "demo.json").read_text()) == story
    html = Path(story["report"]).read_text(encoding="utf-8")
    assert "tuned on shuffled answers" in html and html.count('class="sample"') in (1, 2)


def test_the_same_call_again_trains_nothing(short):
    folder, _, story, overrides = short
    began = {path: path.stat().st_mtime_ns for path in folder.glob("*/adapter/*")}
    assert began
    again = run_demo(folder, overrides=overrides)
    assert {path: path.stat().st_mtime_ns for path in began} == began
    assert again["controls"] == story["controls"] and again["evaluation"] == story["evaluation"]


@pytest.mark.parametrize("name", ["photos", "photos/products", "photos/products/test.csv"])
def test_what_is_no_demo_stays_as_it_is(tmp_path, name):
    (tmp_path / "photos" / "products").mkdir(parents=True)
    (tmp_path / "photos" / "products" / "test.csv").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="is a file: give|is no demo's: give a folder that is new, empty"):
        run_demo(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match="cannot be used"):
        run_demo(tmp_path / "photos/products/test.csv/below")


def test_shuffled_answers_are_the_same_answers_on_other_photos(short):
    folder = short[0]
    dealt, own = read_table(folder / "products/train_shuffled.csv"), read_table(folder / "products/train.csv")
    answer = ("title", "category3_code", "full_price")
    assert [row["imageurl"] for row in dealt] == [row["imageurl"] for row in own]
    answers = [[tuple(row[name] for name in answer) for row in rows] for rows in (dealt, own)]
    assert sorted(answers[0]) == sorted(answers[1])
    moved = sum(mine != theirs for mine, theirs in zip(*answers, strict=True))
    assert moved >= 12
    again = shuffle_answers(folder / "products/train.csv").read_bytes()
    assert again == (folder / "products/train_shuffled.csv").read_bytes()


def test_the_screen_shows_the_whole_story(short):
    story = short[2]
    console = Console(width=100, record=True, file=io.StringIO())
    show_demo(console, story)
    text = console.export_text()
    for words in ("exact match", "full_price", "mean absolute error", "pictures blanked", "expected", story["try"]):
        assert words in text, words


def test_demo_recipe_is_a_recipe_on_the_model_of_the_package(tmp_path):
    recipe = demo_recipe(tmp_path / "train.csv", tmp_path / "test.csv", tmp_path / "run")
    assert Path(recipe.model.name).name == "tiny" and recipe.output == str(tmp_path / "run")
    assert recipe.data.train == str(tmp_path / "train.csv")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_as_a_newcomer_sees_it(tmp_path):
    """At most 5 % before, at least 90 % after, on at least 200 unseen products; the controls do not get there."""
    command = [sys.executable, "-m", "phi3v", "demo", "--output", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    story = json.loads(done.stdout)
    scores, controls = story["evaluation"]["scores"], story["controls"]
    assert story["evaluation"]["rows"] >= 200
    assert scores["base"]["exact_match"]["value"] <= 0.05
    assert scores["tuned"]["exact_match"]["value"] >= 0.90
    assert scores["tuned"]["fields"]["full_price"]["accuracy"]["value"] >= 0.90
    most_frequent = controls["most frequent answer to everything"]["high"]
    assert controls["pictures blanked"]["value"] <= most_frequent
    assert controls["pictures swapped"]["value"] <= most_frequent
    assert controls["tuned on shuffled answers"]["value"] <= most_frequent
    checks = story["evaluation"]["checks"]
    assert story["evaluation"]["metrics"]["exact_match"]["p"] < 0.001
    assert [checks[name]["verdict"] for name in ("overlap", "form", "constant", "images")] == ["pass"] * 4
    assert checks["images"]["with_grey_images"]["value"] <= most_frequent
    assert checks["forgetting"]["rows"] == 24 and checks["forgetting"]["before"]["value"] > 0.3
    assert {one["verdict"] for one in story["shuffled_checks"].values()} == {"fail"}, "constant and images"
