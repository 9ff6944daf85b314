"""The base beside a tuned model is the base of the file, also where the adapter took weights out of it."""

from pathlib import Path

import pytest
from tiny_models import write_photos, write_tiny_model

from phi3v import adapters
from phi3v.errors import CheckpointError, ConfigError
from phi3v.evaluation.run import evaluate
from phi3v.loading import load_target
from phi3v.recipe import Recipe
from phi3v.training.train import train
from phi3v.tuning import lora_config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and ten photos."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 10)
    return folder


@pytest.mark.parametrize(("way", "holds"), [(True, True), ("pissa", False), ("olora", False)])
def test_the_base_beside_has_the_loss_of_the_base_alone(
    world: Path, tmp_path: Path, way: bool | str, holds: bool
) -> None:
    values = {
        "model": str(world / "model"),
        "data": {"train": str(world / "photos" / "rows.jsonl"), "prompt": "What?", "answer": "It is {colour}."},
        "lora": {"r": 4, "init_lora_weights": way},
        "training": {"samples_per_step": 4, "max_steps": 1, "learning_rate": 1e-2, "fast_lora": "off"},
        "evaluation": {"max_new_tokens": 2},
        "output": str(tmp_path / "run"),
    }
    values["data"]["split"] = {"validation": 3}
    recipe = Recipe.from_dict(values)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    train(recipe)
    assert adapters.holds_base(load_target(recipe.output, device="cpu").model) is holds
    alone = evaluate(world / "model", tmp_path / "r.yaml", against=None).tuned
    for target in (Path(recipe.output), Path(recipe.output) / "adapter"):
        found = evaluate(target)
        assert found.base == str(world / "model") and found.base_scores is not None
        assert found.base_scores.loss == pytest.approx(alone.loss, rel=1e-6)
        assert found.tuned.loss != pytest.approx(alone.loss, rel=1e-4)


def test_a_model_without_its_base_in_it_says_so(world: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for options in ({"init_lora_weights": "olora"}, {"bias": "all"}):
        base = load_target(world / "model", device="cpu").model
        tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["o_proj"], **options))
        with pytest.raises(CheckpointError, match="kind of adapter does not hold"), adapters.base_weights(tuned):
            pass


def test_an_adapter_that_began_at_random_is_refused(world: Path, tmp_path: Path) -> None:
    """PEFT makes the residual again when it loads, with other random numbers: the sum would be another model."""
    from peft import LoraConfig, get_peft_model

    base = load_target(world / "model", device="cpu").model
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="pissa_niter_2"))
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: init_lora_weights is 'pissa_niter_2', a random"):
        load_target(tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_not_trained_under_lora(bias: str) -> None:
    with pytest.raises(ConfigError) as error:
        lora_config({"bias": bias})
    assert str(error.value) == (
        f"lora.bias is '{bias}', and the language model has no bias: all would train those of the vision part; take it "
        "out, or train that part with vision.tower or vision.projector"
    )
