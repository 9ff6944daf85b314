"""Evaluation of tiny, untrained models: every kind of target, base beside tuned, what is written, what is refused."""

import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from other_process import holding
from safetensors.torch import load_file, save_file
from tiny_models import write_photos, write_tiny_model
from tiny_runs import HELD_OUT, make_recipe, make_run

from phi3v.adapters import base_weights
from phi3v.data.collate import Collator
from phi3v.data.encode import encode, encode_prompt
from phi3v.errors import CheckpointError, ConfigError, DataError, MissingPackageError
from phi3v.evaluation.answers import answer_rows
from phi3v.evaluation.engine import Engine
from phi3v.evaluation.fields import AnswerTemplate
from phi3v.evaluation.result import prediction_rows
from phi3v.evaluation.row_scores import Column
from phi3v.evaluation.run import evaluate, held_out_rows
from phi3v.evaluation.running_batch import prompt_of
from phi3v.generate import ChatModel
from phi3v.loading import load_processor, load_target
from phi3v.run_folder import RunFolder
from phi3v.run_lock import RunLock
from phi3v.targets import resolve_target

CLOCK = {"seconds": None, "created": None, "memory_gib": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the tiny model, photos and an evaluated run with a random adapter."""
    folder = tmp_path_factory.mktemp("world")
    torch.set_num_threads(1)
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 24)
    recipe = make_recipe(folder)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    make_run(folder, recipe)
    return folder


def fingerprints_of(html: str) -> dict[str, str]:
    """The digests that a report shows."""
    table = html[html.index("<h3>Fingerprints</h3>") :]
    return dict(re.findall(r"<tr><td>([^<]+)</td><td><code>([^<]*)</code>", table))


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def evaluation(world, told):
    return evaluate(world / "run", on_progress=lambda *progress: told.append(progress))


def test_answers_are_those_of_single_questions(world, evaluation):
    held_out = held_out_rows(resolve_target(world / "run"), None, None)
    loaded = load_target(world / "run", device="cpu")
    chat = ChatModel(loaded.model, loaded.processor)
    prompts = [encode_prompt(row, loaded.processor) for row in held_out.rows]
    alone = [chat.answer_encoded([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert [row["tuned"] for row in evaluation.predictions] == alone
    with base_weights(loaded.model):
        alone = [chat.answer_encoded([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert [row["base"] for row in evaluation.predictions] == alone
    assert any(row["base"] != row["tuned"] for row in evaluation.predictions)


def test_loss_is_the_mean_over_all_trained_tokens(world, evaluation):
    held_out = held_out_rows(resolve_target(world / "run"), None, None)
    loaded = load_target(world / "run", device="cpu")
    collate = Collator(loaded.processor.tokenizer.pad_token_id)
    total, tokens = 0.0, 0
    for row in held_out.rows:
        batch = collate([encode(row, loaded.processor)])
        with torch.no_grad():
            logits = loaded.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        wanted = batch["labels"][0, 1:]
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], wanted, ignore_index=-100, reduction="sum"))
        tokens += int((wanted != -100).sum())
    assert evaluation.tuned.loss == pytest.approx(total / tokens, rel=1e-5)
    assert evaluation.base_scores.loss != pytest.approx(evaluation.tuned.loss)


def test_prompt_of_a_sample_is_the_prompt_of_the_question(world):
    held_out = held_out_rows(resolve_target(world / "run"), None, None)
    processor = load_processor(world / "run")
    for row in held_out.rows:
        cut, asked = prompt_of(encode(row, processor)), encode_prompt(row, processor)
        assert set(cut) == set(asked)
        for name in asked:
            torch.testing.assert_close(cut[name], asked[name], rtol=0, atol=0)


def test_a_run_gets_its_files(world, evaluation):
    run = RunFolder(world / "run")
    assert run.read_evaluation() == json.loads(json.dumps(evaluation.to_dict()))
    assert run.read_predictions() == evaluation.predictions
    html = run.report.read_text(encoding="utf-8")
    assert run.prediction_table.read_bytes()[:4] == b"PAR1"
    digests = run.read_evaluation()["fingerprints"]
    assert digests == fingerprints_of(html) and {"held-out rows", "recipe.yaml"} <= digests.keys()
    assert html.count("<img") == 3 + 4 and "projector" in html and "<svg" in html
    assert evaluation.base == str(world / "model") and evaluation.data.endswith("rows.jsonl (split)")
    assert evaluation.tuned.rows == HELD_OUT == len(evaluation.predictions)


def test_progress_is_told_for_both_models(evaluation, told):
    assert {stage for stage, _, _ in told} == {"base answers", "tuned answers"}
    assert [entry for entry in told if entry[0] == "tuned answers"][-1] == ("tuned answers", HELD_OUT, HELD_OUT)


def test_a_killed_evaluation_goes_on_and_ends_as_an_undisturbed_one(world, evaluation, monkeypatch):
    run = RunFolder(world / "run")
    before = run.predictions.read_bytes(), run.read_evaluation() | CLOCK

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "tuned answers" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        evaluate(run.path, on_progress=stop)
    assert caught.value.__notes__[0].startswith("0 of 5 rows are answered and kept")
    assert caught.value.__notes__[1:] == ["kept too: 5 in answers-base.jsonl"]
    kept = run.answers("base").read_text().splitlines()
    assert len(kept) == 2
    earlier = int(evaluation.memory_gib * 2**30) + 2**40  # of a start that took a TiB more
    run.answers("base").write_text(kept[0] + "\n" + re.sub(r'"memory":\s*\d+', f'"memory": {earlier}', kept[1]) + "\n")
    asked, original = [], Engine.answer
    monkeypatch.setattr(Engine, "answer", lambda self, these: asked.append(self) or original(self, these))
    evaluate(run.path)
    assert len(asked) == 1, "the base was asked again"
    after = run.predictions.read_bytes(), run.read_evaluation() | CLOCK
    assert after == before
    assert run.read_evaluation()["memory_gib"] == earlier / 2**30 and 0.05 < evaluation.memory_gib < 500
    assert not any(run.answers(side).exists() for side in ("base", "tuned"))


def test_an_evaluation_of_other_rows_has_a_folder_and_goes_on(world, tmp_path, monkeypatch):
    """Killed in the second model, it asks the first one nothing again and leaves what an undisturbed one leaves."""
    run, asked, original = world / "run", [], Engine.answer
    data = {"data": world / "photos" / "rows.jsonl", "rows": 5, "against": world / "model"}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "other answers" and done:
            raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in run.glob("*.*")}
    whole = evaluate(run, **data, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt) as caught:
        evaluate(run, **data, out=tmp_path / "cut", on_progress=stop)
    assert caught.value.__notes__[0].startswith("0 of 5 rows are answered and kept")
    assert caught.value.__notes__[1:] == ["kept too: 5 in answers-tuned.jsonl"]
    assert [path.name for path in (tmp_path / "cut").glob("answers-tuned*")] == ["answers-tuned.jsonl"]
    monkeypatch.setattr(Engine, "answer", lambda self, these: asked.append(self) or original(self, these))
    evaluate(run, **data, out=tmp_path / "cut")
    assert len(asked) == 1, "the first target was asked again"
    ends = [RunFolder(tmp_path / name) for name in ("whole", "cut")]
    left = ["evaluation.json", "predictions.jsonl", "predictions.parquet", "report.html", "run.lock"]
    assert all(sorted(file.name for file in end.path.iterdir()) == left for end in ends)
    assert ends[0].predictions.read_bytes() == ends[1].predictions.read_bytes()
    assert ends[0].read_predictions() == whole.predictions
    found = [end.read_evaluation() | CLOCK for end in ends]
    assert found[0] == found[1] == json.loads(json.dumps(whole.to_dict() | CLOCK))
    assert {path.name: path.read_bytes() for path in run.glob("*.*")} == before
    html = ends[0].report.read_text(encoding="utf-8")
    digests = found[0]["fingerprints"]
    assert list(digests) == ["rows", "weights of run", "weights of model"] and digests == fingerprints_of(html)
    parquet = pytest.importorskip("pyarrow.parquet")
    stored = parquet.read_schema(ends[0].prediction_table).metadata
    assert {f"phi3v.fingerprints.{name}".encode(): one.encode() for name, one in digests.items()} == stored
    assert (
        "<h1>run beside model</h1>" in html
        and "· model run ·" in html
        and "5 rows of" in html
        and "training never saw" not in html
    )
    assert "<th>model</th><th>run</th>" in html and "weights of model" in html and "before (base)" not in html


def test_a_folder_of_something_else_is_refused(world, tmp_path):
    options = {"rows": 1, "against": None}
    evaluate(world / "run", **options, out=tmp_path / "one")
    with pytest.raises(ConfigError, match=r"holds the evaluation of \S+run on \S+ \(split\): name another folder"):
        evaluate(world / "run", world / "photos" / "rows.jsonl", **options, out=tmp_path / "one")
    with pytest.raises(ConfigError, match="holds the evaluation of"):
        evaluate(world / "run", rows=1, against=world / "model", out=tmp_path / "one")
    for changed, line in (
        ({"rows": 2}, r"\(evaluation.rows: 1 there, 2 here\)"),
        ({"against": "base"}, r'\(evaluation.against: null there, "base" here\)'),
        ({"metrics": ["chrf"]}, r'\(evaluation.metrics: \["exact_match", .*\] there, \["chrf", .*\] here\)'),
        (
            {"checks": ["form"]},
            r'\(evaluation.checks: \["overlap", "form", "constant", "images"\] there, \["form"\] here\)',
        ),
        ({"overrides": ["evaluation.max_new_tokens=3"]}, r"\(evaluation.max_new_tokens: 5 there, 3 here\)"),
    ):
        with pytest.raises(ConfigError, match=r"one holds an evaluation under other settings " + line):
            evaluate(world / "run", **options | changed, out=tmp_path / "one")
    before = (tmp_path / "one" / "predictions.jsonl").read_bytes()
    evaluate(world / "run", **options, out=tmp_path / "one")  # the same again
    assert (tmp_path / "one" / "predictions.jsonl").read_bytes() == before
    adapter = world / "run" / "adapter" / "adapter_model.safetensors"
    kept, weights = adapter.read_bytes(), load_file(adapter)
    save_file({name: weight * 2 for name, weight in weights.items()}, adapter, {"format": "pt"})
    adapter.with_name("digests.json").unlink()  # as who changes weights by hand is told to do
    with pytest.raises(
        ConfigError, match=r"one holds an evaluation by other weights \(\S+run, or its base, was changed"
    ):
        evaluate(world / "run", **options, out=tmp_path / "one")
    assert (tmp_path / "one" / "predictions.jsonl").read_bytes() == before
    adapter.write_bytes(kept)
    photo = next(Path(image) for image in json.loads(before)["images"])
    os.utime(world / "photos" / photo.name, (1, 1))
    with pytest.raises(ConfigError, match=r"under other settings \(other rows or images\): name another folder"):
        evaluate(world / "run", **options, out=tmp_path / "one")
    with pytest.raises(ConfigError, match="adapter, which is of no evaluation"):
        evaluate(world / "run", **options, out=world / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file cannot be used"):
        evaluate(world / "run", **options, out=tmp_path / "file")


def test_a_second_evaluation_in_a_folder_is_refused_until_the_first_is_dead(world, tmp_path):
    """A run's own, and one in a folder; what writes nothing asks for no lock."""
    (tmp_path / "one").mkdir()
    told = r"one is being evaluated by process {} on .*: wait for it, end it, or give another output$"
    with (
        holding(RunLock(tmp_path / "one", doing="evaluated")) as other,
        pytest.raises(ConfigError, match="^--out .*" + told.format(other)),
    ):
        evaluate(world / "run", rows=1, against=None, out=tmp_path / "one")
    with holding(RunLock(world / "run")) as other:
        with pytest.raises(ConfigError, match=f"run is being trained by process {other} on"):
            evaluate(world / "run")
        assert evaluate(world / "run", rows=1, against=None).tuned.rows == 1
    evaluate(world / "run", rows=1, against=None, out=tmp_path / "one")


def test_other_rows_leave_the_run_as_it_is(world, evaluation):
    run = RunFolder(world / "run")
    before = {path: path.read_bytes() for path in (run.evaluation, run.predictions, run.report)}
    few = evaluate(world / "run", rows=2)
    assert [row["tuned"] for row in few.predictions] == [row["tuned"] for row in evaluation.predictions[:2]]
    whole_file = evaluate(world / "run", world / "photos" / "rows.jsonl", rows=3, against=None)
    assert [row["row"] for row in whole_file.predictions] == [0, 1, 2]
    assert whole_file.base is None and whole_file.predictions[0]["base"] is None
    assert {path: path.read_bytes() for path in before} == before


def test_an_adapter_in_a_run_is_the_run(world, evaluation):
    found = evaluate(world / "run" / "adapter")
    assert found.tuned == evaluation.tuned and found.base_scores == evaluation.base_scores


def test_an_adapter_elsewhere_and_a_model_need_a_recipe(world, evaluation, tmp_path):
    shutil.copytree(world / "run" / "adapter", tmp_path / "adapter")
    for target in (tmp_path / "adapter", world / "model"):
        with pytest.raises(ConfigError, match="--data recipe.yaml"):
            evaluate(target)
    found = evaluate(tmp_path / "adapter", world / "recipe.yaml")
    assert found.tuned == evaluation.tuned and found.base_scores == evaluation.base_scores
    alone = evaluate(world / "model", world / "recipe.yaml")
    assert alone.base is None and alone.base_scores is None
    assert alone.tuned == evaluation.base_scores


def test_a_fully_tuned_run_loads_its_base_beside_itself(world, evaluation, tmp_path):
    recipe = make_recipe(world, lora=None, output=str(tmp_path / "full"))
    make_run(tmp_path, recipe)
    found = evaluate(tmp_path / "full")
    assert found.base == str(world / "model")
    assert found.base_scores == evaluation.base_scores
    assert found.tuned != found.base_scores


def test_rows_that_were_left_out_are_named(world, tmp_path):
    rows = (world / "photos" / "rows.jsonl").read_text().splitlines()
    rows += [json.dumps({"image": "nowhere.png", "colour": "red"})]
    (world / "photos" / "more.jsonl").write_text("\n".join(rows) + "\n")
    found = evaluate(world / "run", world / "photos" / "more.jsonl", rows=1, against=None)
    assert len(found.problems) == 1 and "row 24" in found.problems[0] and "nowhere.png" in found.problems[0]


@pytest.mark.parametrize(
    ("target", "data", "error", "words"),
    [
        ("nowhere/at/all", None, CheckpointError, "nowhere/at/all"),
        ("run", "nothing.jsonl", DataError, "nothing.jsonl"),
        ("run", "nothing.yaml", ConfigError, "nothing.yaml"),
    ],
)
def test_what_is_not_there_is_one_line(world, target, data, error, words):
    with pytest.raises(error, match=words) as caught:
        evaluate(world / target if target == "run" else target, data)
    assert "\n" not in str(caught.value)


def test_what_to_compare_with_is_checked_first(world):
    for against, words in (("runs/foo", "runs/foo does not exist"), (world / "photos", "is neither a run")):
        with pytest.raises(CheckpointError, match=words):
            evaluate(world / "run", against=against)
    with pytest.raises(ConfigError, match="'rouge' is no metric; there are exact_match"):
        evaluate(world / "run", metrics=["rouge"])


def test_another_target_stands_beside(world, evaluation, tmp_path):
    """The model itself as the other target answers what the base answers, and nothing is written into the run."""
    run = RunFolder(world / "run")
    before = run.evaluation.read_bytes()
    found = evaluate(run.path, against=world / "model", metrics=["anls"])
    assert run.evaluation.read_bytes() == before
    assert (found.target, found.base, found.against) == (str(run.path), str(world / "model"), "target")
    assert [row["base"] for row in found.predictions] == [row["base"] for row in evaluation.predictions]
    assert list(found.metrics)[:3] == ["anls", "exact_match", "similarity"] and found.to_dict()["primary"] == "anls"
    assert not any("same model" in line for line in found.to_dict()["notes"])
    same = evaluate(run.path, against=run.path / "adapter")
    told = f"{run.path} and {run.path / 'adapter'} are the same model: their weights are equal, so no difference is"
    assert [line.startswith(told) for line in same.to_dict()["notes"] if "same model" in line] == [True]
    for one in same.metrics.values():
        assert one["tuned"] == one["base"] and (one["won"], one["lost"], one["tied"]) == (0, 0, one["tuned"]["rows"])
        assert one["difference"]["value"] in (0, None) and one["p"] in (1, None)


def test_scores_of_rows_add_up_to_the_metrics(evaluation):
    """What predictions.jsonl says of every row is what evaluation.json says of all."""
    assert evaluation.scoring.kind == "templated" and evaluation.against == "base"
    assert list(evaluation.metrics)[:4] == ["exact_match", "field_accuracy", "well_formed", "field_accuracy.colour"]
    for name, figures in evaluation.metrics.items():
        for who in ("tuned", "base"):
            scores = [row["scores"][who][name] for row in evaluation.predictions]
            if name != "loss":
                assert figures[who]["value"] == pytest.approx(sum(scores) / HELD_OUT)
            assert figures[who]["low"] is None or figures[who]["low"] <= figures[who]["value"] <= figures[who]["high"]
        gains = [row["scores"]["tuned"][name] - row["scores"]["base"][name] for row in evaluation.predictions]
        better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        assert (figures["won"], figures["lost"]) == (
            (better, worse) if figures["better"] == "higher" else (worse, better)
        )
    assert evaluation.metrics["exact_match"]["constant"] == evaluation.majority.value
    assert evaluation.metrics["loss"]["tuned"]["value"] == pytest.approx(evaluation.tuned.loss)


def test_a_recipe_without_held_out_rows_is_refused(world, tmp_path):
    recipe = make_recipe(world).with_overrides(["data.split=null"])
    (tmp_path / "none.yaml").write_text(recipe.to_yaml())
    with pytest.raises(ConfigError, match="holds out no rows"):
        evaluate(world / "model", tmp_path / "none.yaml")


def test_windows_do_not_change_the_answers(world):
    held_out = held_out_rows(resolve_target(world / "run"), world / "photos" / "rows.jsonl", 20)
    loaded = load_target(world / "run", device="cpu")
    small = answer_rows(loaded.model, loaded.processor, held_out.rows, batch_size=1, max_new_tokens=3)
    large = answer_rows(loaded.model, loaded.processor, held_out.rows, batch_size=20, max_new_tokens=3)
    assert small.texts == large.texts and small.loss == pytest.approx(large.loss, rel=1e-5)
    nothing = answer_rows(loaded.model, loaded.processor, [], batch_size=1, max_new_tokens=3)
    assert nothing.texts == [] and nothing.loss is None


def test_predictions_hold_the_fields_of_every_answer(world):
    rows = held_out_rows(resolve_target(world / "run"), world / "photos" / "rows.jsonl", 1).rows
    column = Column("exact_match", None, np.array([1.0]))
    scores = {"exact_match": column}, {"exact_match": column}
    said, one = ([" It is red.\n"], ["a red thing"]), np.array([0])
    found = prediction_rows(rows, *said, AnswerTemplate("It is {colour}."), *scores, one)
    assert found[0]["right"] is True and found[0]["row"] == 0 and found[0]["images"] == ["0.png"]
    assert found[0]["image_group"] == 0
    assert found[0]["fields"] == {"colour": {"expected": "red", "base": None, "tuned": "red"}}
    assert found[0]["scores"] == {"tuned": {"exact_match": 1.0}, "base": {"exact_match": 1.0}}
    alone = prediction_rows(rows, ["x"], None, AnswerTemplate("free text"), {}, None, one)[0]
    assert alone["fields"] == {} and alone["scores"] == {"tuned": {}, "base": None}


def test_the_bridge_to_lm_eval_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "phi3v.evaluation.suite", raising=False)
    with pytest.raises(MissingPackageError, match=r'lm_eval, which is not installed: pip install "phi3v\[suite\]"'):
        importlib.import_module("phi3v.evaluation.suite")
