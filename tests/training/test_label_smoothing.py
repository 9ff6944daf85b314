"""Label smoothing: each logit is compared with the token behind it, by our trainer and by transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import tiny_model
from tiny_prompts import IMAGE, batch_of, prompt
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from phi3v.data.step_batch import step_batch
from phi3v.model.register import register
from phi3v.training.step_trainer import StepTrainer

EPSILON, TOKENS = 0.1, 100


def rows() -> dict[str, torch.Tensor]:
    """Two texts of 5 and 9 words, padded on the right."""
    return batch_of([prompt(0, [5], image_id=IMAGE), prompt(1, [9], image_id=IMAGE)], "right")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("way", ["step", "validation", "transformers"])
def test_the_smoothed_loss_is_torchs_own(tmp_path: Path, way: str) -> None:
    register()
    model, batch = tiny_model(image_token_id=IMAGE), rows()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    expected = cross_entropy(logits, targets, reduction="sum", label_smoothing=EPSILON) / TOKENS
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=EPSILON, use_cpu=True, report_to="none")
    trainer: Trainer
    if way == "transformers":
        trainer = Trainer(model=model, args=arguments)
    else:
        trainer = StepTrainer(model=model, args=arguments, step_collator=list)
    inputs = step_batch(batch, IMAGE) if way == "step" else dict(batch)
    loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=TOKENS)
    assert_close(loss, expected, rtol=1e-6, atol=0)
    trained = int((targets != -100).sum())
    assert outputs["logits"].shape[:-1] == (batch["labels"].shape if way == "transformers" else (trained,))
    plain, found = gradients(model, expected), gradients(model, loss)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        limit = 1e-5 * max(float(gradient.abs().max()), 1e-3)
        assert_close(found[name], gradient, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")


def test_held_out_losses_are_not_smoothed(tmp_path: Path) -> None:
    """Runs with and without it are compared by them; training smooths again afterwards."""
    register()
    model, batch = tiny_model(image_token_id=IMAGE), rows()
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=EPSILON, use_cpu=True, report_to="none", per_device_eval_batch_size=1
    )
    held_out = [{name: value[row] for name, value in batch.items()} for row in (0, 1)]
    trainer = StepTrainer(model=model, args=arguments, step_collator=list, eval_dataset=held_out)
    logits, targets = model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-6)
    kept = [row for (row,) in trainer._validated._rows]  # what the interval is made of, a row a batch
    assert [count for _, count in kept] == (batch["labels"][:, 1:] != -100).sum(1).tolist()
    total = cross_entropy(logits, targets, reduction="sum").item()
    assert sum(one for one, _ in kept) == pytest.approx(total, rel=1e-5)
    smoothed = cross_entropy(logits, targets, reduction="sum", label_smoothing=EPSILON) / TOKENS
    assert_close(trainer.compute_loss(model, dict(batch), num_items_in_batch=TOKENS), smoothed, rtol=1e-6, atol=0)
