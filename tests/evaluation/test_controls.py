"""Controls: what is spoiled, who meets whom, and a small model that does look at its pictures."""

import json
import random

import pytest
import torch
from tiny_models import write_photos, write_tiny_model

from phi3v.data.images import open_image
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.errors import DataError
from phi3v.evaluation.controls import answer_controls
from phi3v.evaluation.headline import conclusion
from phi3v.evaluation.run import evaluate
from phi3v.evaluation.spoiled import GREY, blank_images, swap_images
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training.train import train


def make_row(index: int, answer: str, images: tuple[ImageRef, ...]) -> Row:
    parts = (*(ImagePart(place) for place in range(len(images))), TextPart("What is it?"))
    messages = (Message("user", parts), Message("assistant", (TextPart(answer),)))
    return Row(messages, images, {}, "made.jsonl", index)


def rows_of(*answers: str) -> list[Row]:
    return [make_row(index, answer, (ImageRef(f"{index}.png"),)) for index, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("answers", "own", "others"),
    [
        (("cat", "dog", "cat", "dog"), [0, 1, 2, 3], [3, 0, 1, 2]),
        (("a", "b", "c", "d"), [0, 1, 2, 3], [2, 3, 0, 1]),
        (("a", "b"), [0, 1], [1, 0]),
        (("a", "a", "b"), [0, 1, 2], [2, 2, 0]),
    ],
)
def test_partners_have_another_answer(answers, own, others):
    rows, partners = swap_images(rows_of(*answers))
    assert [row.index for row in rows] == own
    assert [row.index for row in partners] == others
    assert all(row.answer != partner.answer for row, partner in zip(rows, partners, strict=True))


def test_partners_have_as_many_images():
    one, two = ImageRef("a.png"), (ImageRef("b.png"), ImageRef("c.png"))
    rows = [make_row(0, "x", (one,)), make_row(1, "y", two), make_row(2, "z", two[::-1]), make_row(3, "text only", ())]
    own, others = swap_images(rows)
    assert [(row.index, other.index) for row, other in zip(own, others, strict=True)] == [(1, 2), (2, 1)]


def test_nobody_to_swap_with_is_one_line():
    with pytest.raises(DataError, match="another answer to swap with"):
        swap_images(rows_of("same", "same"))
    photo = (ImageRef("a.png"),)
    with pytest.raises(DataError, match="other ones"):  # its own photo is not another one's
        swap_images([make_row(0, "x", photo), make_row(1, "y", photo)])


def test_blank_images_are_grey_and_of_the_same_size(tmp_path):
    write_photos(tmp_path, 2)
    rows = [make_row(0, "x", (ImageRef(str(tmp_path / "0.png")), ImageRef(str(tmp_path / "1.png"))))]
    blank = blank_images(rows)
    assert len(blank) == 1 and len(blank[:1]) == 1
    for image, original in zip(blank[0].images, rows[0].images, strict=True):
        opened = open_image(image)
        assert opened.size == open_image(original).size
        assert opened.getcolors() == [(opened.width * opened.height, GREY)]
    assert blank[0].messages == rows[0].messages and "grey" in blank[0].images[0].path


def letters(folder, steps, ask):
    """A run in which a tiny model learns to answer with a letter; `ask` gives each row its question and letter, those
    of training first: 32 and 16 photos of four colours."""
    torch.set_num_threads(1)
    write_photos(folder / "photos", 48)
    rows = ask([json.loads(line) for line in (folder / "photos" / "rows.jsonl").read_text().splitlines()])
    for name, part in (("train", rows[:32]), ("test", rows[32:])):
        (folder / "photos" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    training = {"samples_per_step": 4, "micro_batch_size": 4, "max_steps": steps, "learning_rate": 1e-2}
    recipe = {
        "model": str(write_tiny_model(folder / "model")),
        "data": {
            "train": str(folder / "photos" / "train.jsonl"),
            "validation": str(folder / "photos" / "test.jsonl"),
            "prompt": "{question}",
            "answer": "{letter}",
        },
        "image": {"num_crops": 1},
        "lora": None,
        "vision": {"projector": "train"},
        "training": {**training, "eval_strategy": "no", "save_strategy": "no"},
        "evaluation": {"max_new_tokens": 3, "batch_size": 16, "checks": ["form", "constant", "images"]},
        "output": str(folder / "run"),
    }
    train(Recipe.from_dict(recipe))
    return RunFolder(folder / "run").read_evaluation()


def test_a_model_that_was_tuned_on_shuffled_answers_is_caught(tmp_path):
    """It has learnt the form and what is frequent, half of the rows are right by that, and its base has none."""

    def shuffled(rows):
        letters = dict(zip(dict.fromkeys(row["colour"] for row in rows), "ABCA", strict=True))
        own = [letters[row["colour"]] for row in rows]
        dealt = [*random.Random(0).sample(own[:32], 32), *own[32:]]
        return [{**row, "question": "Which?", "letter": letter} for row, letter in zip(rows, dealt, strict=True)]

    found = letters(tmp_path, 10, shuffled)
    primary, checks = found["metrics"][found["primary"]], found["checks"]
    assert primary["difference"]["value"] > 0.25 and primary["p"] < 0.05, "without its checks it looks better"
    assert {name: one["verdict"] for name, one in checks.items()} == {
        "form": "pass",
        "constant": "fail",
        "images": "fail",
    }
    assert not conclusion(found)["text"].startswith("Better")


def test_a_model_that_learnt_to_ignore_its_images_is_caught(tmp_path):
    """Its questions give the answers away: all rows are right, which no single answer gets, with grey images too."""

    def told(rows):
        drawn = random.Random(0).choices("AB", k=len(rows))
        return [
            {**row, "question": {"A": "up ", "B": "no "}[it] * 40, "letter": it}
            for row, it in zip(rows, drawn, strict=True)
        ]

    found = letters(tmp_path, 40, told)
    checks = found["checks"]
    assert found["metrics"][found["primary"]]["tuned"]["value"] > 0.9, "it has learnt its task"
    assert {name: one["verdict"] for name, one in checks.items()} == {
        "form": "pass",
        "constant": "pass",
        "images": "fail",
    }
    assert checks["images"]["with_grey_images"]["value"] == checks["images"]["with_images"]["value"]
    assert conclusion(found)["text"] == "Better after tuning, but a check failed"


def colours(folder, steps):
    """A run in which a tiny model, all of it tuned from random weights, learns to name the colour of a photo: in 100
    steps for sure.
    """
    torch.set_num_threads(1)
    recipe = Recipe.from_dict(
        {
            "model": str(write_tiny_model(folder / "model")),
            "data": {
                "train": str(write_photos(folder / "photos", 64)),
                "prompt": "What colour?",
                "answer": "It is {colour}.",
                "split": {"validation": 16},
            },
            "lora": None,
            "vision": {"projector": "train"},
            "training": {
                "samples_per_step": 8,
                "micro_batch_size": 8,
                "max_steps": steps,
                "learning_rate": 1e-2,
                "eval_strategy": "no",
                "save_strategy": "no",
            },
            "evaluation": {"max_new_tokens": 12, "batch_size": 16},
            "output": str(folder / "run"),
        }
    )
    train(recipe)
    return RunFolder(recipe.output)


@pytest.mark.slow
def test_a_model_that_looks_loses_its_score_with_the_picture(tmp_path):
    run = colours(tmp_path, 100)
    scores = run.read_evaluation()
    majority = scores["majority"]["share"]["hits"]
    assert scores["scores"]["tuned"]["exact_match"]["hits"] == 16
    assert scores["scores"]["base"]["exact_match"]["hits"] == 0
    told = []
    controls = answer_controls(run.path, on_progress=lambda *progress: told.append(progress))
    assert controls.blanked.hits <= majority < 16
    assert controls.swapped.hits == 0 and controls.follows_swap.hits == 16
    checks = scores["checks"]
    assert [checks[name]["verdict"] for name in ("form", "constant", "images")] == ["pass"] * 3, "a model that looks"
    assert told[-1] == ("with swapped images", 16, 16)


def test_scores_of_a_second_evaluation_are_the_same(tmp_path):
    run = colours(tmp_path, 8)
    first = run.read_evaluation()["scores"]
    assert first["tuned"]["loss"] < first["base"]["loss"]
    assert evaluate(run.path).to_dict()["scores"] == first
