"""Microsoft's step-by-step guide to tuning Phi-3-Vision, working.

Twice: steps 1 to 7 with today's transformers, PEFT and TRL on the native model, as the guide goes; then the same job
with phi3v alone, which adds resuming, scores beside the base and a report.

    python examples/guide.py [FOLDER]

As it stands it runs on the small model that comes with phi3v and generated product photos, in a few minutes on a CPU.
For the real thing put `microsoft/Phi-3-vision-128k-instruct` in MODEL's place, take out the two `num_crops` (the small
model's single crop), name your own table, and give it a GPU.
"""

import sys
from pathlib import Path

import torch
from datasets import Image, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import SFTConfig, SFTTrainer

import phi3v
from phi3v.demo import tiny_model_path
from phi3v.demo.catalogue import write_catalogue

MODEL = str(tiny_model_path())
QUESTION = "What is shown in this image?"
ANSWER = "Product: {title}, Category: {category3_code}, Full Price: {full_price}"


def step_1_data(table: Path):
    """The table, with photos opened from the paths in `imageurl` (the guide's set has web addresses: download them)."""
    dataset = load_dataset("csv", data_files=str(table), split="train")
    dataset = dataset.map(lambda row: {"image": str(table.parent / row["imageurl"])}).cast_column("image", Image())
    return dataset.train_test_split(test_size=20, seed=0)  # the guide's set has no test split either


def step_2_messages(row: dict) -> dict:
    """A chat instead of a prompt by hand: the processor puts the control tokens where the model knows them."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWER.format(**row)}]}
    return {"messages": [question, answer], "images": [row["image"]]}


def step_3_model(model_id: str):
    """The model without remote code, and LoRA on projections that the language model really has."""
    phi3v.register()
    processor = AutoProcessor.from_pretrained(model_id)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=dtype)  # the Trainer places it, on each GPU
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],  # q_proj, v_proj: the vision tower only
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    return processor, model


def step_4_dataset(dataset):
    """Messages and images; pixels are made batch by batch, an image is tens of megabytes when it is unpacked."""
    return dataset.map(step_2_messages, remove_columns=dataset["train"].column_names)


def step_5_arguments(folder: Path, max_steps: int) -> SFTConfig:
    """Loss on the answers alone, nothing cut (an image is 313 to 2,509 tokens), bf16 where there is a GPU."""
    return SFTConfig(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        warmup_steps=0.05,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=max(max_steps // 2, 1),
        assistant_only_loss=True,
        max_length=None,
        bf16=torch.cuda.is_available(),
        report_to="none",  # "wandb" for Weights & Biases
    )


def step_6_train(model, processor, dataset, arguments: SFTConfig) -> SFTTrainer:
    """TRL's trainer with the processor, which makes text and pixels together."""
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=processor,
    )
    trainer.train()
    return trainer


def step_7_save_and_ask(trainer: SFTTrainer, processor, photo, folder: Path) -> str:
    """Adapter and processor into one folder, loaded from there, asked once; only the new tokens are decoded."""
    trainer.save_model(str(folder))
    processor.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    processor = AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=60, eos_token_id=processor.stop_token_ids)
    return processor.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def the_same_with_phi3v(model_id: str, table: Path, photo, folder: Path, max_steps: int) -> str:
    """One recipe: data, LoRA, training that resumes, base beside tuned, a report."""
    recipe = phi3v.Recipe.from_dict(
        {
            "model": model_id,
            "data": {
                "train": str(table),
                "images": "imageurl",
                "prompt": QUESTION,
                "answer": ANSWER,
                "split": {"validation": 20},
            },
            "image": {"num_crops": 1},
            "vision": {"cache": "memory"},
            "lora": {"r": 16, "lora_alpha": 32},
            "training": {
                "samples_per_step": 16,
                "micro_batch_size": 4,
                "max_steps": max_steps,
                "learning_rate": 2e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.05,
            },
            "evaluation": {"max_new_tokens": 60},
            "output": str(folder),
        }
    )
    phi3v.train(recipe, on_event=lambda event: print(event.metrics) if event.metrics else None)
    print("exact match on held-out rows:", phi3v.evaluate(folder).tuned.exact_match.value)
    chat = phi3v.ChatModel.from_target(folder)  # stays loaded for many questions
    assert chat.ask(photo, QUESTION) == phi3v.ask(folder, photo, QUESTION)  # loads, answers once
    return chat.ask(photo, QUESTION)


def main(folder: Path, model_id: str, table: Path, max_steps: int = 150) -> None:
    """The guide, then the same with phi3v."""
    dataset = step_1_data(table)
    photo = dataset["test"][0]["image"].convert("RGB")
    processor, model = step_3_model(model_id)
    processor.image_processor.num_crops = 1
    arguments = step_5_arguments(folder / "checkpoints", max_steps)
    trainer = step_6_train(model, processor, step_4_dataset(dataset), arguments)
    print("the guide's way:", step_7_save_and_ask(trainer, processor, photo, folder / "adapter"))
    print("with phi3v:", the_same_with_phi3v(model_id, table, photo, folder / "run", max_steps))


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/guide")
    main(target, MODEL, write_catalogue(target / "products")["train"])
