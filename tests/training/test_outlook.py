"""What a run amounts to: steps as the sampler makes them, and arithmetic as it was counted for the real sizes."""

from typing import Any

import pytest
import torch

from phi3v.data.lengths import RowLength
from phi3v.data.survey import RowFacts
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.recipe import Recipe
from phi3v.training.outlook import language_operations, measure_rate, micro_batches, outlook, vision_operations
from phi3v.training.sampling import epoch_order

SQUARE = RowFacts("shop.csv", 0, RowLength(757, 100, 30, ((640, 640),)), ((640, 640),), (), b"")


def recipe(**sections: Any) -> Recipe:
    return Recipe.from_dict({"model": {"name": "some/model", "device": "cpu"}, "data": "rows.csv", **sections})


@pytest.fixture(scope="module")
def config() -> Phi3VConfig:
    """The sizes of Phi-3.5-Vision."""
    factors = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    return Phi3VConfig(max_position_embeddings=131072, rope_scaling=factors)


@pytest.mark.parametrize(("rows", "samples", "epochs"), [(2736, 16, 3.0), (5, 2, 1.0), (40, 4, 2.5), (1, 8, 1.0)])
def test_steps_are_those_of_the_sampler(rows: int, samples: int, epochs: float) -> None:
    found = outlook(recipe(training={"samples_per_step": samples, "epochs": epochs}), rows, [], None, None)
    assert found.steps_per_epoch == len(epoch_order(rows, samples, 0, 0)) / samples
    assert found.steps == -(-found.steps_per_epoch * epochs // 1)
    assert (found.tokens, found.operations, found.rate) == (None, None, None)
    capped = outlook(recipe(training={"max_steps": 7}), rows, [], None, None)
    assert capped.steps == 7


def test_micro_batches_are_those_of_the_plan(config: Phi3VConfig) -> None:
    lengths, step = [300, 900, 500, 300], {"samples_per_step": 4}
    assert micro_batches(recipe(training=step), lengths) == (3.0, 900)
    assert micro_batches(recipe(training={**step, "tokens_per_micro_batch": 1200}), lengths) == (2.0, 1100)
    assert micro_batches(recipe(training={**step, "micro_batch_size": 2, "packing": False}), lengths) == (2.0, 1800)
    found = outlook(recipe(training=step), 4, [SQUARE] * 4, config, 4)
    assert (found.micro_batches, found.largest, found.packed) == (4.0, 857, True)


def test_operations_of_the_real_sizes(config: Phi3VConfig) -> None:
    lora, tokens = recipe(), 857
    matrices, attention, head = 4 * 3.624e9 * tokens, 3.5 * 2 * 32 * 3072 * tokens**2, 4 * 3072 * 32064 * tokens
    assert language_operations(lora, config, tokens) == pytest.approx(matrices + attention + head, rel=1e-3)
    # five crops through 23 layers of ViT-L/14 are 1.86e12, counted operation by operation
    assert vision_operations(lora, config, SQUARE, 4) == pytest.approx(1.86e12, rel=0.03)
    tuned = [vision_operations(recipe(vision={"tower": way}), config, SQUARE, 4) for way in ("frozen", "lora", "train")]
    assert tuned == [passes * tuned[0] for passes in (1, 2, 3)]
    again = recipe(training={"gradient_checkpointing": True})
    more = language_operations(again, config, tokens) - language_operations(lora, config, tokens)
    today = recipe(training={"activation_checkpointing": True})  # TrainingArguments' newer name
    assert language_operations(today, config, tokens) == language_operations(again, config, tokens)
    ranks = recipe(training={"fsdp": True, "fsdp_config": {"activation_checkpointing": True}})
    assert language_operations(ranks, config, tokens) == language_operations(again, config, tokens)
    assert more == pytest.approx(matrices / 2 + attention / 3.5, rel=1e-3)
    whole = language_operations(recipe(lora=None), config, tokens)
    assert whole == pytest.approx(1.5 * (matrices + head) + attention, rel=1e-3)


def test_a_run_is_its_samples_and_cached_features_are_made_once(config: Phi3VConfig) -> None:
    plain = recipe(training={"samples_per_step": 2, "epochs": 3.0})
    found = outlook(plain, 4, [SQUARE] * 4, config, 4)
    one = language_operations(plain, config, 857)
    vision = vision_operations(plain, config, SQUARE, 4)
    assert (found.steps, found.tokens) == (6, 12 * 857) and found.operations == pytest.approx(12 * (one + vision))
    cached = recipe(training={"samples_per_step": 2, "epochs": 3.0}, vision={"cache": "memory"})
    kept = outlook(cached, 4, [SQUARE] * 4, config, 4).operations
    assert kept == pytest.approx(12 * one + 4 * vision)


def test_the_rate_of_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, rate = measure_rate(recipe(), seconds=0.05)
    assert machine.startswith("CPU (") and machine.endswith("float32") and 1e6 < rate < 1e14

    clock, tries = [0.0], []

    def product(rows: torch.Tensor, weights: torch.Tensor) -> None:
        forward = not weights.is_contiguous()  # x W^T, and backward g W
        tries.append((forward, rows.dtype))
        clock[0] += (0.001 if forward else 0.003) * (10 if len(tries) < 3 else 1)  # a busy moment at first

    monkeypatch.setattr("phi3v.training.outlook.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", product)
    machine, rate = measure_rate(recipe(model={"name": "some/model", "device": "cpu", "dtype": "bfloat16"}))
    assert rate == pytest.approx(2 * 2 * 256**3 / 0.004) and machine.endswith("bfloat16")
    assert set(tries) == {(True, torch.bfloat16), (False, torch.bfloat16)}
