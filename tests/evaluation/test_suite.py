"""lm-eval asks our models: its scores and answers are those of `phi3v evaluate`, its likelihoods those of the loss."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_photos, write_tiny_model
from tiny_runs import make_recipe, make_run

import phi3v
from phi3v.data.columns import RowOptions
from phi3v.data.reading import Reading
from phi3v.data.sources import load_rows
from phi3v.demo import tiny_model_path
from phi3v.demo.scenes import scene
from phi3v.errors import ConfigError, DataError
from phi3v.evaluation.answers import answer_rows
from phi3v.evaluation.result import Evaluation
from phi3v.generate import ChatModel

lm_eval = pytest.importorskip("lm_eval", reason='needs lm_eval: pip install "phi3v[suite]"')
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from phi3v.evaluation import running_batch, suite  # noqa: E402

ROWS = 12
TASK = """task: scenes
dataset_path: imagefolder
dataset_kwargs: {data_dir: DATA}
test_split: test
output_type: generate_until
doc_to_image: [image]
doc_to_text: "<image>\\n{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|end|>"], do_sample: false, max_gen_toks: 40}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICES = """include: scenes.yaml
task: choices
output_type: multiple_choice
doc_to_choice: "{{[answer, 'a hat', '0000']}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
RECIPE = """model: MODEL
data: {train: DATA, validation: DATA, prompt: "{question}", answer: "{answer}"}
evaluation: {batch_size: 4, max_new_tokens: 40, checks: []}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with questions as a folder of images, two tasks over it, and the same rows as a recipe."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "data" / "test").mkdir(parents=True)
    lines = []
    for index in range(ROWS):
        made = scene(4242, index)
        made.image.save(folder / "data" / "test" / f"{index}.png")
        question, answer = made.turns[0]
        lines.append(json.dumps({"file_name": f"{index}.png", "question": question, "answer": answer}))
    (folder / "data" / "test" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "scenes.yaml").write_text(TASK.replace("DATA", str(folder / "data")))
    (folder / "choices.yaml").write_text(CHOICES)
    recipe = RECIPE.replace("DATA", str(folder / "data" / "test")).replace("MODEL", str(tiny_model_path()))
    (folder / "recipe.yaml").write_text(recipe)
    return folder


@pytest.fixture(scope="module")
def model() -> suite.SuiteModel:
    return suite.SuiteModel(str(tiny_model_path()), batch_size="4", device="cpu")


def run(world: Path, model: Any, task: str, **more: Any) -> dict[str, Any]:
    tasks = TaskManager(include_path=str(world), include_defaults=False)
    how = {"apply_chat_template": True, "bootstrap_iters": 0, **more}
    found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=tasks, **how)
    return {**found, "samples": sorted(found["samples"][task], key=lambda sample: sample["doc_id"])}


@pytest.fixture(scope="module")
def ours(world: Path) -> Evaluation:
    return phi3v.evaluate(tiny_model_path(), world / "recipe.yaml", against=None, device="cpu")


def test_a_task_gets_the_answers_and_the_score_of_evaluate(world, model, ours, datasets_cache, monkeypatch):
    together = []
    batch, step = running_batch.RunningBatch, running_batch.RunningBatch.step
    monkeypatch.setattr(batch, "step", lambda its: (together.append(len(its.rows)), step(its))[1])
    found = run(world, model, "scenes")
    assert [sample["resps"][0][0] for sample in found["samples"]] == [row["tuned"] for row in ours.predictions]
    assert [sample["exact_match"] for sample in found["samples"]] == [row["right"] for row in ours.predictions]
    score = found["results"]["scenes"]["exact_match,none"]
    assert score == ours.to_dict()["metrics"]["exact_match"]["tuned"]["value"]
    assert 0.3 < score < 1, "rows of both kinds, or equal scores would say little"
    assert max(together) == 4, "rows are answered in the running batch"


def test_the_suites_own_backend_runs_the_registered_model(world, ours, datasets_cache):
    """As docs/evaluation.md has it: with the chat template, and without a line break behind `<image>`."""
    phi3v.register()
    task = (world / "scenes.yaml").read_text().replace("task: scenes", "task: inline").replace("<image>\\n", "<image>")
    (world / "inline.yaml").write_text(task)
    backend = get_model("hf-multimodal")(pretrained=str(tiny_model_path()), batch_size=4, device="cpu")
    found = run(world, backend, "inline", limit=4)
    assert [sample["resps"][0][0] for sample in found["samples"]] == [row["tuned"] for row in ours.predictions[:4]]


def test_likelihoods_are_the_losses_of_evaluate(world, model):
    options = RowOptions(prompt="{question}", answer="{answer}")
    rows, _ = load_rows(str(world / "data" / "test"), options=options, reading=Reading())
    rows = rows[:5]
    expected = answer_rows(model.chat.model, model.chat.processor, rows, batch_size=2, max_new_tokens=40)
    requests = [likelihood(model, row.question, f"{row.answer}<|end|>\n<|endoftext|>", row.images[0]) for row in rows]
    found = model.loglikelihood(requests, disable_tqdm=True)
    torch.testing.assert_close([-value for value, _ in found], expected.losses, rtol=1e-4, atol=1e-4)
    right = [text == row.answer for text, row in zip(expected.texts, rows, strict=True)]
    assert [greedy for _, greedy in found] == right, "likeliest token by token is what greedy answers are"
    assert len(set(right)) == 2


def likelihood(model: suite.SuiteModel, question: str, continuation: str, image: Any) -> Instance:
    prompt = model.apply_chat_template([{"role": "user", "content": f"<image>{question}"}])
    arguments = (prompt, continuation, {"visual": [str(Path(image.root, image.path))]})
    return Instance("loglikelihood", {}, arguments, 0)


def test_multiple_choice_takes_the_likeliest(world, model, datasets_cache):
    found = run(world, model, "choices", limit=4)
    asked = [one[0] for sample in found["samples"] for one in sample["resps"]]
    assert len(asked) == 12
    best = [max(range(3), key=lambda place, at=at: asked[at + place][0]) for at in range(0, 12, 3)]
    assert [sample["acc"] for sample in found["samples"]] == [place == 0 for place in best]
    assert found["results"]["choices"]["acc,none"] > 0.5


def test_prompts_are_the_processors(model, monkeypatch):
    chat = [
        {"role": "user", "content": "<image>\nIs <|end|> a word?"},
        {"role": "assistant", "content": "<image>"},
        {"role": "user", "content": "And here <image> or <image>"},
    ]
    guard = "\ufdd0"
    asked = f"<|user|>\n<|image_1|>\nIs <{guard}|end|> a word?<|end|>\n<|assistant|>\n<image><|end|>\n"
    rest = "<|user|>\nAnd here <|image_2|>\n or <|image_3|>\n<|end|>\n"
    assert model.apply_chat_template(chat) == asked + rest + "<|assistant|>\n"
    assert model.apply_chat_template([*chat, {"role": "assistant", "content": "No:"}], add_generation_prompt=False) == (
        asked + rest + "<|assistant|>\nNo:"
    )
    monkeypatch.setattr(model.chat, "system", "Be brief.")
    system = "<|system|>\nBe brief.<|end|>\n"
    assert model.apply_chat_template(chat) == system + asked + rest + "<|assistant|>\n"
    own = [{"role": "system", "content": "Shout."}, {"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(own) == "<|system|>\nShout.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"


def test_ways_of_generation(tmp_path, monkeypatch):
    """Requests in their own ways, answers in their own places: greedy ones, cut ones, and those for `generate`."""
    write_tiny_model(tmp_path)
    small = suite.SuiteModel(str(tmp_path), batch_size=2, device="cpu")
    prompt = small.apply_chat_template([{"role": "user", "content": "Hi"}])
    ways = [{"max_gen_toks": 6}, {"max_gen_toks": 6, "num_beams": 2, "do_sample": False}, {"max_gen_toks": 3}]
    asked = []
    plain = small.chat.answer_encoded
    monkeypatch.setattr(
        small.chat, "answer_encoded", lambda *given, **how: (asked.append(how), plain(*given, **how))[1]
    )
    texts = small.generate_until([Instance("generate_until", {}, (prompt, way), 0) for way in ways], disable_tqdm=True)
    encoded = small.chat.encode([{"role": "user", "content": "Hi"}])
    alone = [plain([encoded], max_new_tokens=6), plain([encoded], max_new_tokens=6, num_beams=2)]
    assert texts == [*alone[0], *alone[1], *plain([encoded], max_new_tokens=3)]
    assert asked == [{"batch_size": 2, "max_new_tokens": 6, "num_beams": 2}]
    until = {"max_gen_toks": 6, "until": [texts[0][2:4]]}
    cut = small.generate_until([Instance("generate_until", {}, (prompt, until), 0)], disable_tqdm=True)
    assert cut == [texts[0][: texts[0].find(texts[0][2:4])]] and len(cut[0]) <= 2


def test_a_run_answers_as_its_recipe_says(tmp_path):
    """Adapter, crops, system turn; questions about one picture, and about two."""
    write_tiny_model(tmp_path / "model")
    write_photos(tmp_path / "photos", 24)
    recipe = make_recipe(tmp_path)
    make_run(tmp_path, recipe.with_overrides(["data.system=Be brief.", "image.num_crops=2"]))
    ran = suite.SuiteModel(str(tmp_path / "run"), batch_size=2, device="cpu")
    assert ran.chat.processor.image_processor.num_crops == 2
    photos = [scene(1, index).image for index in (1, 2)]
    asked = []
    for content, own in (("<image>\nWhat colour?", photos[:1]), ("<image>\n<image>\nWhich?", photos)):
        prompt = ran.apply_chat_template([{"role": "user", "content": content}])
        asked.append(Instance("generate_until", {}, (prompt, {"max_gen_toks": 5}, {"visual": own}), 0))
    texts = ran.generate_until(asked, disable_tqdm=True)
    chat = ChatModel.from_target(tmp_path / "run", device="cpu")
    alone = [chat.ask(photos[0], "What colour?", max_new_tokens=5), chat.ask(photos, "Which?", max_new_tokens=5)]
    assert texts == alone
    plain = ChatModel.from_target(tmp_path / "model", device="cpu", num_crops=2)
    base = [plain.ask(photos[0], "What colour?", system="Be brief.", max_new_tokens=5)]
    assert texts[:1] != base, "the adapter changes what is said, or it might be missing"


def test_what_is_refused(model, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"--batch_size is 'auto'"):
        suite.SuiteModel("nowhere", batch_size="auto")
    with pytest.raises(ConfigError, match=r"model_args.*crops"):
        suite.SuiteModel("nowhere", crops=4)
    image = scene(1, 1).image
    with pytest.raises(ConfigError, match="add --apply_chat_template"):
        model.generate_until([Instance("generate_until", {}, ("<image>Hi", {}, {"visual": [image]}), 0)])
    shots = [{"role": "user", "content": "<image>Hi"}, {"role": "assistant", "content": "Ho"}]
    prompt = model.apply_chat_template([*shots, shots[0]])
    with pytest.raises(DataError, match=r"holds <\|image_2\|> without an image"):
        model.generate_until([Instance("generate_until", {}, (prompt, {}, {"visual": [image]}), 0)])
    with pytest.raises(ConfigError, match="take another"):
        model.loglikelihood_rolling([])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: get_model("phi3v")("nowhere", batch_size="auto"))
    with pytest.raises(SystemExit, match="phi3v: --batch_size is 'auto'"):
        suite.main()
    assert get_model("phi3v") is sys.modules["phi3v.evaluation.suite"].SuiteModel
