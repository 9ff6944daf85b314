"""The model card: what of a run stands in it, that texts stay texts, that no path does."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import write_photos, write_tiny_model
from tiny_runs import make_recipe, make_run

from phi3v.errors import ConfigError
from phi3v.evaluation.run import evaluate
from phi3v.export import onnx
from phi3v.export.card import (
    Card,
    base_id,
    fenced,
    folder_name,
    header,
    plain,
    question,
    render_card,
    settings,
    sources,
)
from phi3v.export.run import export
from phi3v.export.vllm import OTHER_TOWER, Serving
from phi3v.generate import ChatModel
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.targets import resolve_target

BASE = "microsoft/Phi-3.5-vision-instruct"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """A run that was evaluated, with a system turn that would be markup."""
    folder = tmp_path_factory.mktemp("card")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 12)
    system = json.dumps("Be brief.\n```\n# Heading <script>")
    made = make_run(folder, make_recipe(folder).with_overrides([f"data.system={system}"]))
    evaluate(made.path)
    return made


def test_the_card_says_what_the_run_says(run: RunFolder, tmp_path: Path) -> None:
    export(run.path, tmp_path / "merged", to="merged", base=BASE)
    text = (tmp_path / "merged" / "README.md").read_text()
    start, head, body = text.split("---\n", 2)
    assert start == "" and yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "mit",
        "base_model": BASE,
        "base_model_relation": "finetune",
        "tags": ["phi3_v", "phi3v"],
    }
    evaluation = run.read_evaluation()
    for one in evaluation["metrics"].values():
        assert f"| {one['label']} | " in body.replace("\\", "")
    assert "On 5 held-out rows, with intervals at 95 %." in body and "| 95 % interval |" in body
    table = [line for line in body.partition("## Checks")[0].splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(evaluation["metrics"]) and {line.count("|") for line in table} == {7}
    assert "\n".join(table) in body, "an empty line would end the table"
    assert table[0].endswith("| best single answer |") and "| 40.0 % |" in table[2], table
    assert "If neither were better, a difference as large" in body
    for name, check in evaluation["checks"].items():
        assert f"- **{name}: {check['verdict']}.** " in body
    assert "photo.jpg 'What colour?'\n" in body and '"text": "What colour?"' in body
    assert "- rows.jsonl\n" in body and "| tuned | LoRA, r 16, alpha 32, on qkv\\_proj" in body
    assert "```text\nIt is {colour}.\n```" in body
    assert "````text\nBe brief.\n```\n# Heading <script>\n````" in body  # its own fence ends nothing
    for runtime in (
        "phi3v ask run photo.jpg",
        "transformers.pipeline(",
        "AutoModelForImageTextToText",
        OTHER_TOWER,
    ):
        assert runtime in body
    assert "vllm serve" not in body
    assert "under the MIT licence" in body
    for place in (tmp_path, run.path.parent):
        assert not [file for file in (tmp_path / "merged").iterdir() if str(place).encode() in file.read_bytes()]


def test_the_card_of_a_checkpoint_has_no_scores_of_the_finished_run(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    (copy.checkpoints / "checkpoint-1").parent.mkdir(exist_ok=True)
    shutil.copytree(copy.adapter, copy.checkpoints / "checkpoint-1", dirs_exist_ok=True)
    for target, told in ((copy.adapter, True), (copy.checkpoints / "checkpoint-1", False)):
        export(target, tmp_path / f"out-{told}", to="adapter", base=BASE)
        card = (tmp_path / f"out-{told}" / "README.md").read_text(encoding="utf-8")
        assert ("held-out rows, with intervals" in card) is told and "checkpoints" not in card


def test_a_card_of_weights_alone_says_only_what_is_known() -> None:
    text = render_card(Card("shop <i>", "onnx", None, {"precision": "int4"}))
    assert (
        "# shop \\<i\\>" in text and "onnxruntime-genai (int4)" in text and "phi3v ask shop--i--onnx photo.jpg" in text
    )
    assert "## Scores" not in text and "## Data" not in text and "MIT" not in text
    assert header(Card("shop", "adapter", "owner/base", {})) == {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "tags": ["phi3_v", "phi3v"],
    }


MICROSOFTS = {
    "rope_scaling": {"type": "su"},
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("samples", "limits", "says", "silent"),
    [
        ({}, (1, 4096), "raise it where your questions have several", "Here that is so"),
        (
            {"most_images": 0, "shortest": 20, "longest": 4096},
            (1, 4096),
            "Only weights trained on nothing but longer",
            "this run's",
        ),
        (
            {"most_images": 3, "shortest": 300, "longest": 4097},
            (3, 8192),
            "300 to 4,097 tokens, and beyond 4,096 vLLM",
            "Only weights",
        ),
        (
            {"most_images": 2, "shortest": 4097, "longest": 8193},
            (2, 12288),
            "All samples of this run were longer",
            "Here that",
        ),
        (
            {"most_images": 1, "shortest": 9, "longest": 200_000},
            (1, 131072),
            "with --max-model-len 4096 they are not",
            "raise it",
        ),
    ],
)
def test_the_command_for_vllm_lets_the_questions_of_the_run_pass(samples, limits, says: str, silent: str) -> None:
    serving = Serving.of(MICROSOFTS, samples)
    assert (serving.images, serving.context) == limits
    card = render_card(Card("shop", "merged", BASE, {"dtype": "bfloat16"}, serving=serving))
    options = f"--max-model-len {limits[1]} --limit-mm-per-prompt '{{\"image\": {limits[0]}}}'\n```\n"
    assert f"vllm serve shop {options}" in card and says in card and silent not in card
    assert 'with `"temperature": 0` it takes the likeliest' in card and OTHER_TOWER not in card
    assert Serving.of({**MICROSOFTS, "vision_config": {}}, samples) is None
    assert bool(serving.caveat) is ("Here that is so" in card) is (samples.get("shortest", 9999) <= 4096 < limits[1])


def test_a_card_says_whose_answers_its_scores_are(run: RunFolder) -> None:
    in_4_bits = run.read_recipe().with_overrides(["quantization={load_in_4bit: true}"])
    evaluation = run.read_evaluation()
    for to, precision, recipe, told in (
        ("onnx", "int4", run.read_recipe(), "They were not measured with these int4 graphs"),
        ("onnx", "fp32", in_4_bits, "merged into the base as its files have it"),
        ("merged", None, in_4_bits, "merged into the base as its files have it"),
        ("adapter", None, in_4_bits, "The lines below load the base as its files have it"),
        ("onnx", "fp16", run.read_recipe(), None),
    ):
        text = render_card(
            Card("shop", to, BASE, {"dtype": "x", "precision": precision}, recipe, evaluation=evaluation)
        )
        for line in (
            "They were not measured with these int4",
            "merged into the base as its files have it",
            "The lines below",
        ):
            assert (line in text) is (told is not None and told.startswith(line)), (to, precision, line)
        unseen = render_card(Card("shop", to, BASE, {"dtype": "x"}, recipe))
        assert recipe is not in_4_bits or (told in unseen and "It was not evaluated." in unseen)


def test_a_card_says_how_weights_come_from_their_base_where_that_is_known() -> None:
    tuned = Recipe.from_dict({"model": BASE, "data": "x.csv", "output": "/tmp/run"})
    for to, precision, recipe, relation in (
        ("merged", None, tuned, "finetune"),
        ("merged", None, None, None),
        ("onnx", "fp32", tuned, "finetune"),
        ("onnx", "fp32", None, None),
        ("onnx", "int4", tuned, "quantized"),
        ("onnx", "int4", None, "quantized"),
    ):
        found = header(Card("shop", to, BASE, {"precision": precision}, recipe))
        assert (found["base_model"], found.get("base_model_relation")) == (BASE, relation), (to, precision)


def test_exports_of_one_run_have_names_of_their_own() -> None:
    for title in ("shop", "shop-lora", "shop-onnx"):
        assert [folder_name(title, to) for to in ("merged", "adapter", "onnx")] == ["shop", "shop-lora", "shop-onnx"]
    assert folder_name("-lora", "merged") == "-lora" and folder_name("my shop", "onnx") == "my-shop-onnx"


def test_texts_stay_texts() -> None:
    assert plain("a *b*\n<i>[x](y)| `c`") == "a \\*b\\* \\<i\\>\\[x\\]\\(y\\)\\| \\`c\\`"
    assert fenced("a\n````\nb") == "`````text\na\n````\nb\n`````"


def test_sets_are_named_without_their_folders() -> None:
    several = [
        {"source": "/home/me/shop/products.csv"},
        {"source": "owner/set"},
        {"source": "https://a:b@c/d.jsonl?e=f"},
    ]
    recipe = Recipe.from_dict({"model": "owner/base", "data": {"train": several}, "output": "/tmp/run"})
    assert sources(recipe) == ["products.csv", "owner/set", "d.jsonl"]
    whole = Recipe.from_dict({"model": "a/b", "data": "x.csv", "lora": None, "output": "/tmp/run"})
    assert settings(whole)["tuned"] == "the whole language model" and settings(whole)["epochs"] == "3"


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("models--microsoft--Phi-3.5-vision-instruct/snapshots/4a0d", BASE),
        ("models--owner--base/snapshots/1", "owner/base"),
        ("Phi-3-vision-128k-instruct", "microsoft/Phi-3-vision-128k-instruct"),
        ("our-model", None),
    ],
)
def test_the_base_is_known_by_its_folder(folder: str, found: str | None, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text("{}")
    place = resolve_target(tmp_path / folder)
    assert base_id(place) == found and base_id(place, "given/name") == "given/name"
    assert base_id(resolve_target("owner/name")) == "owner/name"
    assert base_id(resolve_target("owner/name"), str(tmp_path / folder)) == found
    for given in ("nix", "owner/", "/owner/name", "a/b/c", "owner/na me", "../name", str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match="is neither a hub id .OWNER/NAME, .* nor a folder that is there$"):
            base_id(place, given)


@pytest.mark.parametrize("to", ["merged", "adapter"])
def test_the_system_turn_of_a_run_goes_with_its_weights(
    to: str, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run.path, tmp_path / "out", to=to)
    asked = [ChatModel.from_target(target, device="cpu") for target in (run.path, tmp_path / "out")]
    assert asked[0].system == asked[1].system == "Be brief.\n```\n# Heading <script>"
    photo = run.path.parent / "photos" / "0.png"
    answers = [chat.ask(photo, "What colour?", max_new_tokens=6) for chat in asked]
    assert answers[0] == answers[1] != ""
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")  # whose own programs say the same
    programs = re.findall(r"```python\n(.*?)\n```\n", card, re.DOTALL)
    assert len(programs) == {"merged": 2, "adapter": 1}[to]
    lines = {sum(line != "" for line in one.splitlines()) for one in programs}
    assert lines <= {5, 6}  # six with the base of an adapter, or with the run's system turn in a pipeline
    monkeypatch.setattr(ChatModel.ask, "__kwdefaults__", {**ChatModel.ask.__kwdefaults__, "max_new_tokens": 6})
    places = {"run": tmp_path / "out", "run-lora": tmp_path / "out", "photo.jpg": photo}
    for program in programs:
        for name, put in {**places, "THE BASE": run.path.parent / "model"}.items():
            program = program.replace(f'"{name}"', f'"{put}"')
        printed: list[str] = []
        exec(compile(program.replace("256", "6"), "README.md", "exec"), {"print": printed.append})
        assert printed[0].removeprefix(" ") == answers[0]


def test_the_system_turn_goes_on_from_export_to_export(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an adapter and of merged weights, also into a folder of graphs, whose graphs are not built here."""

    def decoder(config: object, merged: Path, folder: Path, precision: str) -> dict[str, Any]:
        return {"model": {}}

    for name in ("refuse_without_packages", "write_vision", "write_embedding"):
        monkeypatch.setattr(onnx, name, lambda *args: None)
    monkeypatch.setattr(onnx, "build_decoder", decoder)
    export(run.path, tmp_path / "adapter", to="adapter")
    export(tmp_path / "adapter", tmp_path / "merged", to="merged")
    export(tmp_path / "merged", tmp_path / "again", to="merged", dtype="float16")
    export(tmp_path / "merged", tmp_path / "onnx", to="onnx")
    for name in ("adapter", "merged", "again", "onnx"):
        about = json.loads((tmp_path / name / "phi3v.json").read_text())
        assert about["system"] == run.read_recipe().data.system, name
        assert "````text\nBe brief.\n```\n# Heading <script>\n````" in (tmp_path / name / "README.md").read_text()
    assert ChatModel.from_target(tmp_path / "again", device="cpu").system == run.read_recipe().data.system


@pytest.mark.parametrize("prompt", ["{question}", "What?\nWhere?", "<|image_1|> What?", "a" * 201, " "])
def test_a_question_that_is_no_plain_line_is_not_the_cards(prompt: str) -> None:
    recipe = Recipe.from_dict({"model": "some/name", "data": {"train": "a.csv", "prompt": prompt, "answer": "{x}"}})
    assert question(recipe) == question(None) == "What is shown in this image?"
