"""A citizen of the libraries around it: pipelines, PEFT, transformers' Trainer, TRL's trainers."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image, List
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from PIL import Image as Pictures
from tiny_models import COLOURS, write_tiny_model
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.model.register import register

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs trl: install phi3v[test]")
PROJECTIONS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
QUESTION = "What colour is it?"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    register()
    return write_tiny_model(tmp_path_factory.mktemp("citizens") / "model")


@pytest.fixture
def model(folder) -> Phi3VForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def processor(folder) -> Phi3VProcessor:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def photos() -> list[Pictures.Image]:
    return [Pictures.new("RGB", (40, 30), colour) for colour in COLOURS.values()]


def chat(photo) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": QUESTION}]}]


def answered(photo, answer: str) -> list[dict]:
    return [*chat(photo), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def training_batch(processor, photos) -> dict[str, torch.Tensor]:
    conversations = [answered(photo, f"It is {name}.") for photo, name in zip(photos, COLOURS, strict=True)]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    batch = dict(processor.apply_chat_template(conversations, processor_kwargs={"padding": True}, **options))
    mask = batch.pop("assistant_masks").bool()
    batch["labels"] = batch["input_ids"].masked_fill(~mask, -100)
    assert 0 < mask.sum() < mask.numel() / 10
    return batch


# ---- pipeline ----


@pytest.mark.parametrize("where", ["folder", "objects"])
def test_pipeline_with_a_chat(folder, model, processor, photos, where):
    made = {"model": str(folder)} if where == "folder" else {"model": model, "processor": processor}
    pipe = pipeline("image-text-to-text", **made)
    assert type(pipe.model) is Phi3VForCausalLM and type(pipe.processor) is Phi3VProcessor
    output = pipe(text=chat(photos[0]), max_new_tokens=6, do_sample=False, return_full_text=False)
    batch = processor.apply_chat_template(
        chat(photos[0]), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    new = pipe.model.generate(**batch, max_new_tokens=6, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert output[0]["generated_text"].strip() == processor.decode(new, skip_special_tokens=True).strip()


def test_pipeline_with_a_prompt_and_with_several(model, processor, photos):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    prompts = [f"<|user|>\n<|image_1|>\n{QUESTION}<|end|>\n<|assistant|>\n", "<|user|>\n<|image_1|>\nHow?<|end|>\n"]
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    alone = [pipe(images=photo, text=text, **options)[0] for photo, text in zip(photos, prompts, strict=False)]
    together = pipe(images=[[photos[0]], [photos[1]]], text=prompts, batch_size=2, **options)
    flat = [entry[0] if isinstance(entry, list) else entry for entry in together]
    assert [entry["generated_text"] for entry in flat] == [entry["generated_text"] for entry in alone]


# ---- PEFT ----


def steps_of(model, batch, steps=3, rate=1e-2) -> list[float]:
    """Losses of a few optimiser steps on one batch."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lora_from_attaching_to_merging(folder, model, processor, photos, tmp_path):
    batch = training_batch(processor, photos)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tuned = get_peft_model(model, LoraConfig(**LORA))
    trainable = {key for key, value in tuned.named_parameters() if value.requires_grad}
    assert len(trainable) == 2 * 4 * 2 and not any("vision" in key for key in trainable)
    losses = steps_of(tuned, batch)
    assert losses[-1] < losses[0]
    for key, value in tuned.base_model.model.state_dict().items():
        if "lora" not in key:
            assert torch.equal(value, before[key.replace(".base_layer", "")]), key
    with torch.no_grad():
        expected = tuned.eval()(**batch).logits
        assert not torch.allclose(expected, Phi3VForCausalLM.from_pretrained(folder)(**batch).logits, atol=1e-3)
    tuned.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    by_hand = PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    merged = by_hand.merge_and_unload()
    assert type(merged) is Phi3VForCausalLM and merged.state_dict().keys() == before.keys()
    assert type(AutoProcessor.from_pretrained(tmp_path / "adapter")) is Phi3VProcessor
    with torch.no_grad():
        for other in (loaded, again, merged):
            assert_close(other.eval()(**batch).logits, expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert_close(saved(**batch).logits, expected, rtol=0, atol=1e-5)


def test_transformers_loads_doras_magnitudes(model, tmp_path):
    tuned = get_peft_model(model, LoraConfig(**LORA, use_dora=True)).eval()
    for name, weight in tuned.named_parameters():
        if "magnitude" in name:
            weight.data *= 1.5
    tuned.save_pretrained(tmp_path)
    ids = {"input_ids": torch.tensor([[1, 5, 9, 20]])}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert_close(loaded(**ids).logits, tuned(**ids).logits, rtol=0, atol=1e-5)


def test_an_adapted_model_generates_and_is_switched_off(model, processor, photos):
    batch = processor.apply_chat_template(
        [chat(photo) for photo in photos[:2]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**batch, **options)
    tuned = get_peft_model(model, LoraConfig(**LORA))
    torch.nn.init.normal_(tuned.base_model.model.model.layers[0].self_attn.qkv_proj.lora_B["default"].weight, std=3.0)
    assert not torch.equal(tuned.generate(**batch, **options), plain)
    with tuned.disable_adapter():
        assert torch.equal(tuned.generate(**batch, **options), plain)


VISION_TOO = r".*(vision_model.*\.(q_proj|v_proj|fc1)|img_projection\.[02]|self_attn\.qkv_proj)$"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_lora_on_the_tower_the_plain_gradients_in_the_trainer(folder, photos, tmp_path, reentrant):
    batch, seen = training_batch(AutoProcessor.from_pretrained(folder), photos), []

    class Looking(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})

    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=VISION_TOO, init_lora_weights=False))
        twice = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        args = arguments(output_dir=str(tmp_path), max_steps=1, max_grad_norm=0.0, **twice)
        Trainer(model, args, data_collator=lambda rows: batch, train_dataset=[0, 1], callbacks=[Looking()]).train()
    plain, checkpointed = seen
    assert plain.keys() == checkpointed.keys() and sum("vision_model" in name for name in plain) >= 2 * 2 * 3
    for name, gradient in plain.items():
        assert bool(gradient.any()), name
        assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_images_beside_embeddings_are_refused_and_not_dropped(model, processor, photos):
    """PEFT's prompt tuning makes embeddings of the ids itself, and hands the pixels on."""
    batch = training_batch(processor, photos)
    ids = batch["input_ids"]
    embeddings = model.get_input_embeddings()(ids.clamp(max=100))
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    given = {key: batch[key] for key in ("pixel_values", "image_sizes")}
    features = {"image_features": torch.zeros(1, 32), "image_sizes": batch["image_sizes"]}
    for call in (
        lambda: tuned(**batch),
        lambda: model(inputs_embeds=embeddings, **given),
        lambda: model(inputs_embeds=embeddings, **features),
        lambda: model.generate(inputs_embeds=embeddings, max_new_tokens=1, **given),
    ):
        with pytest.raises(ValueError, match="^inputs_embeds were given with images, which would not be seen: pass"):
            call()
    assert model(inputs_embeds=embeddings).logits.shape[:2] == ids.shape


# ---- trainers ----


def arguments(kind=TrainingArguments, **changes):
    """Three steps, nothing written, nothing reported."""
    fields = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    fields |= {
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return kind(**{**fields, "lr_scheduler_type": "constant", "seed": 1, **changes})


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(model, processor, photos, tmp_path, checkpointing):
    def collate(rows):
        return training_batch(processor, photos)

    args = arguments(
        output_dir=str(tmp_path),
        max_steps=6,
        gradient_checkpointing=checkpointing,
        eval_strategy="steps",
        eval_steps=6,
        prediction_loss_only=True,
    )
    rows = [{"row": number} for number in range(4)]
    trainer = Trainer(model, args, data_collator=collate, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 6 and losses[-1] < losses[0]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated and evaluated[-1] < losses[0]
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    batch = training_batch(processor, photos)
    with torch.no_grad():
        assert_close(saved(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=1e-5)


def test_trainer_divides_by_the_tokens_of_the_whole_step(model, processor, photos, tmp_path):
    """Two micro-batches of unequal length give the loss and the gradients of one batch."""
    conversations = [answered(photo, "Red. " * (1 + 5 * number)) for number, photo in enumerate(photos)]

    def collate(rows):
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
        chosen = [conversations[row["row"]] for row in rows]
        batch = dict(processor.apply_chat_template(chosen, processor_kwargs={"padding": True}, **options))
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        return batch

    start = {key: value.clone() for key, value in model.state_dict().items()}
    results = []
    for size, accumulation in ((4, 1), (1, 4)):
        model.load_state_dict(start)
        args = arguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            optim="sgd",
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
        )
        trainer = Trainer(model, args, data_collator=collate, train_dataset=[{"row": row} for row in range(4)])
        trainer.train()
        results.append((losses_of(trainer), {key: value.clone() for key, value in model.state_dict().items()}))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-4)
    for key, value in results[0][1].items():
        assert_close(results[1][1][key], value, rtol=0, atol=1e-5)


def photo_rows(photos, **columns) -> Dataset:
    """Four rows, each with a list of one photo and the given columns."""
    return Dataset.from_dict({"images": [[photo] for photo in photos], **columns}).cast_column("images", List(Image()))


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


@needs_trl
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
@pytest.mark.parametrize("lora", [False, True])
def test_sft_trainer(model, processor, photos, tmp_path, form, lora):
    from trl import SFTConfig, SFTTrainer

    answers = [f"It is {name}." for name in COLOURS]
    if form == "messages":
        columns = {"messages": [said("user", QUESTION) + said("assistant", answer) for answer in answers]}
        special = {"assistant_only_loss": True}
    else:
        columns = {
            "prompt": [said("user", QUESTION)] * 4,
            "completion": [said("assistant", answer) for answer in answers],
        }
        special = {}
    args = arguments(SFTConfig, output_dir=str(tmp_path), max_steps=8, max_length=None, **special)
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=photo_rows(photos, **columns),
        processing_class=processor,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[0] == 2 and batch["image_sizes"].shape == (2, 2)
    assert (batch["labels"] != -100).sum() < 60 and not (batch["labels"] == processor.image_token_id).any()
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 8 and losses[-1] < losses[0]


@needs_trl
def test_sft_trainer_on_all_tokens_and_rows_with_none_one_and_two_images(folder, processor, photos, tmp_path):
    """TRL's default trains every token; image tokens among the labels are left out by the model, here from a path."""
    from trl import SFTConfig, SFTTrainer

    rows = {"messages": [said("user", QUESTION) + said("assistant", "Red.")] * 4}
    images = [[photos[0]], [], [photos[1], photos[2]], [photos[3]]]
    made = Dataset.from_dict({"images": images, **rows}).cast_column("images", List(Image()))
    args = arguments(SFTConfig, output_dir=str(tmp_path), max_steps=4, max_length=None, per_device_train_batch_size=4)
    trainer = SFTTrainer(str(folder), args=args, train_dataset=made)
    assert type(trainer.model) is Phi3VForCausalLM and type(trainer.processing_class) is Phi3VProcessor
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[0] == 4 and (batch["labels"] == processor.image_token_id).any()
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]


@needs_trl
@pytest.mark.parametrize("way", ["lora", "whole", "path"])
def test_dpo_trainer(folder, model, processor, photos, tmp_path, way):
    """Without an adapter TRL loads the reference from the folder; a policy from it, and its processor, as well."""
    from trl import DPOConfig, DPOTrainer

    names = list(COLOURS)
    columns = {
        "prompt": [said("user", QUESTION)] * 4,
        "chosen": [said("assistant", f"It is {name}.") for name in names],
        "rejected": [said("assistant", f"It is {name}.") for name in names[::-1]],
    }
    args = arguments(DPOConfig, output_dir=str(tmp_path), max_steps=4 if way == "lora" else 1, max_length=None)
    trainer = DPOTrainer(
        str(folder) if way == "path" else model,
        args=args,
        train_dataset=photo_rows(photos, **columns),
        processing_class=None if way == "path" else processor,
        peft_config=LoraConfig(**LORA) if way == "lora" else None,
    )
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "log 2: the policy starts as the reference"
    if way == "lora":
        assert losses[-1] < losses[0]
        return
    policy, reference = trainer.model, trainer.ref_model
    assert type(policy) is type(reference) is Phi3VForCausalLM
    assert torch.equal(reference.lm_head.weight, Phi3VForCausalLM.from_pretrained(folder).lm_head.weight)
    assert not torch.equal(policy.lm_head.weight, reference.lm_head.weight)


def test_labels_that_repeat_the_image_tokens_do_not_teach_them(model, processor, photos):
    """Collators of other libraries copy all ids into the labels; image tokens are left out of the loss."""
    batch = training_batch(processor, photos)
    everything = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    text_only = everything["labels"].masked_fill(batch["input_ids"] == processor.image_token_id, -100)
    before = everything["labels"].clone()
    for at_labels in (False, True):
        with torch.no_grad():
            loss = model(**everything, trained_logits_only=at_labels).loss
            assert_close(loss, model(**{**batch, "labels": text_only}).loss, rtol=0, atol=1e-6)
    assert torch.equal(everything["labels"], before)
