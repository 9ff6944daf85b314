"""Recipes: what they hold, what they refuse and in which words, and what they leave unimported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3v.errors import ConfigError
from phi3v.recipe import LORA_DEFAULTS, Recipe
from phi3v.recipe_yaml import read_yaml, write_yaml

BASE = {"model": "some/name", "data": "rows.csv"}


def refusal(*overrides: str, **sections: object) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict({**BASE, **sections}, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_words_are_a_recipe() -> None:
    recipe = Recipe.from_dict(BASE, name="shop")
    assert (recipe.model.name, recipe.data.train, recipe.output) == ("some/name", "rows.csv", "runs/shop")
    assert recipe.lora == LORA_DEFAULTS
    assert (recipe.vision.tower, recipe.vision.projector, recipe.quantization) == ("frozen", "frozen", None)
    assert recipe.data.split is not None and recipe.data.split.validation == 0.1


def test_the_output_is_named_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "burberry_lora.yaml"
    path.write_text("\ufeffmodel: a/b\ndata: {train: x.csv}\n", encoding="utf-8")  # with a byte order mark
    assert Recipe.load(path).output == "runs/burberry_lora"
    assert Recipe.load(path, ["output=elsewhere"]).output == "elsewhere"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.trian=a", "unknown key data.trian; did you mean data.train?"),
        ("models=a", "unknown key models; did you mean model?"),
        (
            "model.device_map=auto",
            "model.device_map: one process that spreads a model over GPUs computes on one of them at a time; take it "
            "out and start one for each GPU, torchrun --nproc-per-node=N -m phi3v train, with training.fsdp=true where "
            "no GPU holds the model",
        ),
        ("learning_rate=1e-4", "unknown key learning_rate; did you mean training.learning_rate?"),
        ("data.image=photo", "unknown key data.image; did you mean data.images?"),
        ("lora=none", "lora: given 'none', allowed is a mapping (key: value lines), or null for none"),
        ("data.num_crops=4", "unknown key data.num_crops; did you mean image.num_crops?"),
        (
            "vision.qqq=1",
            "unknown key vision.qqq; valid are tower, projector, tower_learning_rate, projector_learning_rate, cache, "
            "cache_gb, cache_folder",
        ),
        ("data.split.sed=1", "unknown key data.split.sed; did you mean data.split.seed?"),
        ("training.seed=abc", "training.seed: given 'abc', allowed is a whole number"),
        ("training.seed=true", "training.seed: given true, allowed is a whole number"),
        ("training.seed=1.5", "training.seed: given 1.5, allowed is a whole number"),
        ("training.seed=-1", "training.seed: given -1, allowed is a number from 0 on"),
        ("training.epochs=0", "training.epochs: given 0, allowed is a number above 0"),
        ("training.epochs=.nan", "training.epochs: given nan, allowed is a finite number"),
        ("model.dtype=fp16", "model.dtype: given 'fp16', allowed is 'auto', 'bfloat16', 'float32' or 'float16'"),
        ("model.revision=1234567", "model.revision: given 1234567, allowed is text; put it in quotes"),
        ("output=", "output: given null (nothing), allowed is text"),
        (
            "training.epochs=null",
            "training.epochs: given null (nothing), allowed is a number; leave it out for its default, 3.0",
        ),
        ("lora=5", "lora: given 5, allowed is a mapping (key: value lines), or null for none"),
        ("training=5", "training: given 5, allowed is a mapping (key: value lines)"),
        ("evaluation.numeric_fields=price", "evaluation.numeric_fields: given 'price', allowed is a list"),
        ("training.output_dir=x", "training.output_dir is computed; set output instead"),
        (
            "training.gradient_accumulation_steps=4",
            "training.gradient_accumulation_steps is computed; set training.samples_per_step instead",
        ),
        (
            "training.micro_batch_size=5",
            "training.samples_per_step is 16, which is no multiple of training.micro_batch_size, 5; change one of them",
        ),
    ],
)
def test_mistakes_are_named(override: str, line: str) -> None:
    assert refusal(override) == line


@pytest.mark.parametrize("value", ["0", "1.0", "1.5", "-3", "true", "half", "null"])
def test_a_split_is_a_number_of_rows_or_a_share(value: str) -> None:
    assert refusal(f"data.split.validation={value}").startswith("data.split.validation: given ")


def test_a_split_keeps_its_type() -> None:
    assert Recipe.from_dict(BASE, ["data.split.validation=30"]).data.load_options["validation_split"] == 30
    assert Recipe.from_dict(BASE, ["data.split.validation=0.3"]).data.load_options["validation_split"] == 0.3
    assert Recipe.from_dict(BASE, ["data.split=null"]).data.load_options["validation_split"] is None


def test_several_mistakes_share_the_line() -> None:
    line = refusal("image.num_crops=0", "training.seed=x", "report.to=[wandb, foo]", "vision.tower=half")
    assert line.count(";") == 3 and line.endswith("and 1 more")


def test_a_template_without_quotes_is_explained() -> None:
    assert "needs quotes" in refusal("data.answer={title}")
    for text in ("{title} {price}", "{title}, {price}"):
        assert "not valid YAML: " in refusal(f"data.answer={text}")
        assert refusal(f"data.answer={text}").endswith("; text that begins with { needs quotes around it")
    asked = """data={train: a.csv, prompt: What is shown in this image?, answer: "Product: {title}, Price: {price}"}"""
    assert refusal(asked).endswith("; text with a ? inside { } or [ ] needs quotes around it")
    assert "quotes" not in refusal("""data={answer: "Product: {title}, {price}" , train: [a.csv}"""), "it has them"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("foo", "is not of the form section.key=value"),
        ("=1", "is not of the form section.key=value"),
        ("a..b=1", "is not of the form section.key=value"),
        ("output.x=1", "output is 'runs/run', which has no keys below it"),
        ("training.seed=[1", "not valid YAML"),
    ],
)
def test_broken_overrides_are_named(override: str, words: str) -> None:
    line = refusal(override)
    assert repr(override) in line and words in line


def test_overrides_reach_into_sections_and_pass_through_mappings() -> None:
    recipe = Recipe.from_dict(
        BASE,
        [
            "model.dtype=float32",
            "lora.r=8",
            "lora.rank_pattern.o_proj=4",
            "quantization.load_in_4bit=true",
            "training.learning_rate=1e-4",
            "training.optim_args=a=b",
            "training.warmup_steps=0.1",
            "report.to=wandb",
        ],
    )
    assert (recipe.model.name, recipe.model.dtype) == ("some/name", "float32")
    assert recipe.lora == {**LORA_DEFAULTS, "r": 8, "rank_pattern": {"o_proj": 4}}
    assert recipe.quantization == {"load_in_4bit": True}
    assert recipe.training.options == {"learning_rate": 1e-4, "optim_args": "a=b", "warmup_steps": 0.1}
    assert recipe.report.to == ["wandb"]
    assert recipe.with_overrides(["report.to=none", "lora=null"]).report.to == []


def test_defaults_are_not_shared_between_recipes() -> None:
    first = Recipe.from_dict(BASE)
    assert first.lora is not None
    first.lora["target_modules"].append("q_proj")
    second = Recipe.from_dict(BASE)
    assert second.lora is not None and second.lora["target_modules"][-1] == "down_proj"
    assert LORA_DEFAULTS["target_modules"][-1] == "down_proj"


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.from_dict(BASE).output = "x"  # type: ignore[misc]


@pytest.mark.parametrize("overrides", [[], ["lora=null", "data.split=null", "data.answer='{a}: \"1e-4\"'"]])
def test_the_resolved_recipe_round_trips(overrides: list[str], tmp_path: Path) -> None:
    recipe = Recipe.from_dict(BASE, [*overrides, "model.revision='1e5'", "training.optim=adamw_torch", "lora.x=null"])
    path = tmp_path / "other_name.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe
    assert recipe.differences(Recipe.load(path)) == []


def test_differences_name_dotted_keys_but_not_the_output() -> None:
    first, second = Recipe.from_dict(BASE), Recipe.from_dict(BASE, ["training.seed=2", "training.optim=x", "output=y"])
    assert first.differences(second) == ["training.seed: 0 here, 2 there", "training.optim: not set here, 'x' there"]
    third = Recipe.from_dict(BASE, ["training.tokens_per_micro_batch=3000", "training.save_total_limit=null"])
    assert Recipe.from_dict(BASE).differences(third) == [
        "training.tokens_per_micro_batch: not set here, 3000 there",
        "training.save_total_limit: not set here, null there",  # null keeps all checkpoints
    ]


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    for content, words in [
        (b"model: a\ndata: [1\n", "line 3"),
        (b"model: a\nmodel: b\n", "line 2: not valid YAML: the key 'model' stands twice"),
        (b"model: \xff\n", "is not UTF-8 text"),
        (b"- a\n", "a recipe is a mapping of sections"),
        (b"", "broken.yaml is empty; write at least model"),
        (b"model: a\ndata: b\nlearning_rate: 1", "broken.yaml: unknown key learning_rate; did you mean training.lea"),
        (b"model: a\ndata: b\ntraining: {seed: x}", "broken.yaml: training.seed: given 'x'"),
        (b"a: &x [*x]", "aliases"),
    ]:
        broken.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            Recipe.load(broken)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    broken.write_bytes(b"model: a\ndata: b\n")
    with pytest.raises(ConfigError, match="^override .data.trian=x.: unknown key data.trian; did you mean data.train"):
        Recipe.load(broken, ["data.trian=x"])  # a mistake of the command, not of the file
    with pytest.raises(ConfigError, match="gone.yaml cannot be read: No such file"):
        Recipe.load(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        ("yes", "yes"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("007", 7),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("./a", "./a"),
        ("[1, 2.5, x]", [1, 2.5, "x"]),
    ],
)
def test_plain_values_mean_what_they_look_like(text: str, value: object) -> None:
    found = read_yaml(text, "here")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value", ["1e-4", "yes", "null", "0o7", "", "~", "a\nb\n", " x ", "2024-01-01", "<<", "{a}", "-"]
)
def test_written_text_is_read_as_text(value: str) -> None:
    assert read_yaml(write_yaml({"a": value, "b": [value]}), "here") == {"a": value, "b": [value]}


def test_recipes_import_neither_torch_nor_transformers() -> None:
    source = str(Path(__file__).resolve().parents[1] / "src")
    program = (
        "import sys; from phi3v.recipe import Recipe; from phi3v.run_folder import RunFolder\n"
        "Recipe.from_dict({'model': 'a', 'data': 'b'}).to_yaml()\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'peft', 'numpy') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"train": []}, "data.train: given [], allowed is a list that is not empty"),
        (None, "data: given null (nothing), allowed is a name or a mapping (key: value lines)"),
        ({"train": 5}, "data.train: given 5, allowed is text; put it in quotes"),
        ({"train": [5]}, "data.train.0: given 5, allowed is a mapping (key: value lines)"),
        ({"train": [{"weight": 1.0}]}, "data.train.0.source is missing; add it to the recipe"),
        ({"train": ["a", {"source": "b", "weight": 0}]}, "data.train.1.weight: given 0, allowed is a number above 0"),
        ({"train": [{"source": "b", "wieght": 1}]}, "unknown key data.train.0.wieght; did you mean data.train.weight?"),
        ({"train": "a", "promt": "b"}, "unknown key data.promt; did you mean data.prompt?"),
        ({"train": "a", "max_skipped": 2.0}, "data.max_skipped: given 2.0, allowed is a number up to 1"),
    ],
)
def test_mistakes_in_a_list_of_sets_are_named_by_their_place(data: dict | None, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict({"model": "a/b", "data": data})
    assert str(caught.value) == line


def test_several_sets_keep_what_they_say_and_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a set does not say stays open, so that the section's value holds for it; null is something that is said."""
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "00000.tar").write_text("")
    monkeypatch.chdir(tmp_path)
    sets = ["a.csv", {"source": "*.tar", "weight": 2, "images": None}, "some/hub"]
    recipe = Recipe.from_dict({"model": "a/b", "data": {"train": sets}})
    said = [{"source": "a.csv"}, {"source": "*.tar", "weight": 2.0, "images": None}, {"source": "some/hub"}]
    assert recipe.data.load_options["train"] == said
    assert recipe.data.train_name == "a.csv, *.tar, some/hub"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml").data == recipe.data
    placed = recipe.with_places()
    assert [one.source for one in placed.data.train] == [f"{tmp_path}/a.csv", f"{tmp_path}/*.tar", "some/hub"]
    assert recipe.differences(placed) == []


@pytest.mark.parametrize(
    ("text", "overrides", "line"),
    [
        ("", ["trainin.seed=3"], "override 'trainin.seed=3': unknown key trainin; did you mean training?"),
        (
            "",
            ["training.seed=x", "output=a"],
            "override 'training.seed=x': training.seed: given 'x', allowed is a whole",
        ),
        ("", ["evaluation={row: 3}"], "override 'evaluation={row: 3}': unknown key evaluation.row; did you mean"),
        ("trainin: {seed: 3}", ["output=a"], "recipe {}: unknown key trainin; did you mean training?"),
        (
            "report: {sample: 3}",
            ["report.to=none"],
            "recipe {}: unknown key report.sample; did you mean report.samples?",
        ),
    ],
)
def test_a_mistake_is_said_to_be_where_it_is(text: str, overrides: list[str], line: str, tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(f"model: a/b\ndata: rows.csv\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        Recipe.load(path, overrides)
    assert str(caught.value).startswith(line.replace("{}", str(path)))
