"""Rows that turn out to be unusable in training: named, replaced, and without an effect on steps and resumed runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_photos, write_tiny_model

import phi3v
from phi3v.errors import ConfigError, DataError
from phi3v.loading import load_processor
from phi3v.run_folder import RunFolder
from phi3v.training.callbacks import TrainingEvent
from phi3v.training.samples import encoded_rows, facts_of_samples, make_samples, read_data

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and 20 photos, of which number 7 breaks in its middle: header and end are sound."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 20)
    photo = folder / "photos" / "7.png"
    data = bytearray(photo.read_bytes())
    place = data.index(b"IDAT") + 8
    data[place : place + 8] = b"\xff" * 8
    photo.write_bytes(bytes(data))
    return folder


def make(world: Path, output: Path, changes: dict[str, Any], data: dict[str, Any]) -> phi3v.Recipe:
    values = {
        "model": {"name": str(world / "model"), "device": "cpu"},
        "data": {
            "train": str(world / "photos" / "rows.jsonl"),
            "prompt": "Which colour?",
            "answer": "It is {colour}.",
            "split": None,
            **data,
        },
        "lora": {"r": 4, "lora_dropout": 0.1},
        "training": {
            "samples_per_step": 4,
            "micro_batch_size": 2,
            "max_steps": 6,
            "save_steps": 2,
            "seed": 3,
            **changes,
        },
        "evaluation": {"max_new_tokens": 4},
        "output": str(output),
    }
    return phi3v.Recipe.from_dict(values)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_photo_stops_neither_a_run_nor_its_resuming(
    streaming: bool, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"streaming": streaming, "max_skipped": 0.1}
    whole = make(world, tmp_path / "whole", {}, data)
    result = phi3v.train(whole)
    assert (result.status, result.steps) == ("trained", 6)  # 24 samples of 20 rows: all photos have had their turn

    def interrupt(event: TrainingEvent) -> None:
        if event.kind == "step" and event.step == 3:
            raise KeyboardInterrupt

    cut = make(world, tmp_path / "cut", {}, data)
    with pytest.raises(KeyboardInterrupt):
        phi3v.train(cut, on_event=interrupt)
    assert phi3v.train(cut).resumed_from == 2
    weights = [load_file(RunFolder(r.output).adapter / "adapter_model.safetensors") for r in (whole, cut)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for recipe in (whole, cut):
        (problem,) = RunFolder(recipe.output).read_problems()
        assert len(RunFolder(recipe.output).problems.read_text().splitlines()) == 1  # reading drops doubles
        assert (problem["row"], problem["reason_code"], problem["found"]) == (7, "image_unreadable", "training")
        assert "7.png does not decode" in problem["message"]


def test_more_broken_photos_than_allowed_stop(world: Path, tmp_path: Path) -> None:
    """The way out that the line names is one: it goes on and ends as one that was never stopped."""
    late, loose, weights = {"seed": 2, "save_steps": 6}, {"max_skipped": 0.1}, []  # row 7 comes in step 4
    phi3v.train(make(world, tmp_path / "free", late, loose), report=False)
    for name, often, strict, more in (
        (
            "few",
            2,
            {"max_skipped": 0.01},
            ", and data.max_skipped leaves 0: mend the data and give another output, or raise it, w",
        ),
        (
            "none",
            1,
            {"on_problem": "stop", **loose},
            r" \(data.on_problem is stop: mend the data and give another output, or set skip",
        ),
    ):
        line = rf"row 7: image 7.png does not decode.*{more}.*; then the same command goes on from checkpoint-\d$"
        for _ in range(often):  # the same again ends at the same place
            with pytest.raises(DataError, match=line) as caught:
                phi3v.train(make(world, tmp_path / name, late, strict))
            assert str(caught.value).endswith("checkpoint-2")
        result = phi3v.train(make(world, tmp_path / name, late, loose), report=False)
        assert (result.resumed_from, result.steps) == (2, 6)
        weights.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights == [(tmp_path / "free" / "adapter" / "adapter_model.safetensors").read_bytes()] * 2
    with pytest.raises(ConfigError, match=r"another recipe \(data.max_skipped: 0.05 here, 0.1 there\)"):
        phi3v.train(make(world, tmp_path / "few", late, {"max_skipped": 0.05}))


def test_a_broken_photo_among_validation_rows_is_left_out_of_the_scores(world: Path, tmp_path: Path) -> None:
    rows = (world / "photos" / "rows.jsonl").read_text().splitlines()
    (world / "photos" / "held.jsonl").write_text("\n".join(rows[6:9]) + "\n")
    data = {"validation": str(world / "photos" / "held.jsonl"), "max_skipped": 0.2}
    recipe = make(world, tmp_path / "run", {"max_steps": 1}, data)
    result = phi3v.train(recipe)
    run = RunFolder(recipe.output)
    assert result.held_out == 3 and [line["row"] for line in run.read_predictions()] == [0, 2]
    assert any("row 1: image 7.png does not decode" in line for line in run.read_evaluation()["problems"])


def test_the_summary_knows_images_and_lengths_of_the_samples(world: Path, tmp_path: Path) -> None:
    """As they are encoded; most images are those of a held-out row here, and of a stream nothing is known."""
    folder = world / "photos"
    for name, first, counts in (("few", 0, [1, 2, 1, 2]), ("most", 10, [3, 1])):  # photos of their own
        rows = [{"image": [f"{first + one}.png" for one in range(count)], "colour": "red" * count} for count in counts]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    given = {"train": str(folder / "few.json"), "validation": str(folder / "most.json")}
    recipe, processor = make(world, tmp_path / "run", {}, given), load_processor(str(world / "model"))
    data = read_data(recipe, processor, lambda *told: None)
    tokens = sorted(len(one["input_ids"]) for one in encoded_rows(recipe, data.train, processor))
    assert facts_of_samples(data) == {"most_images": 3, "shortest": tokens[0], "longest": tokens[-1]}
    assert tokens[-1] > tokens[0] + 100
    streamed = make(world, tmp_path / "streamed", {}, given | {"streaming": True})
    assert facts_of_samples(read_data(streamed, processor, lambda *told: None)) == {}


def test_the_recipe_says_which_answers_are_trained(world: Path, tmp_path: Path) -> None:
    """Two turns a row: with all answers trained the loss is over the tokens of both."""
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": "0.png", "conversations": [*turns, {**turns[0], "value": "Sure?"}, {**turns[1], "value": "yes"}]}]
    (world / "photos" / "talk.json").write_text(json.dumps(rows * 4))
    trained = {}
    for train_on in ("last_assistant", "all_assistant"):
        data = {"train": str(world / "photos" / "talk.json"), "train_on": train_on}
        recipe = make(world, tmp_path / train_on, {"max_steps": 1}, data)
        values = recipe.model_dump()
        values["data"] |= {"prompt": "{prompt}", "answer": "{answer}"}
        recipe = phi3v.Recipe.from_dict(values)
        processor = load_processor(str(world / "model"))
        samples, _ = make_samples(
            recipe,
            RunFolder(tmp_path),
            read_data(recipe, processor, lambda *told: None),
            processor,
            SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8192)),
            steps_done=0,
            on_features=lambda done, total: None,
        )
        labels = samples[0]["labels"]
        trained[train_on] = processor.tokenizer.decode(labels[labels != -100])
    assert trained["last_assistant"].startswith("yes<|end|>") and "red" not in trained["last_assistant"]
    assert trained["all_assistant"].startswith("red<|end|>") and "yes<|end|>" in trained["all_assistant"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"training": {}}, "data.streaming needs training.max_steps"),
        ({"vision": {"cache": "memory"}}, "vision.cache keeps all rows"),
        ({"data": {"train": "a.csv", "streaming": True}}, "data.split.validation is a share"),
        (
            {"data": {"train": "a.csv", "streaming": True, "max_rows": 9}, "training": {}},
            "data.streaming needs training.max_steps: .*; data.max_rows is for .*; data.split.validation is a share",
        ),
    ],
)
def test_what_a_stream_cannot_give_is_one_line(changes: dict[str, Any], line: str) -> None:
    values = {
        "model": "a/b",
        "data": {"train": "a.csv", "streaming": True, "split": None},
        "training": {"max_steps": 5},
    }
    with pytest.raises(ConfigError, match=f"^{line}"):
        phi3v.Recipe.from_dict(values | changes)
