"""The doctor: a sound training passes, and each defect of Microsoft's guide is seen in a batch or in gradients."""

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_model
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import phi3v
from phi3v.data.collate import Collator, PackedCollator, StepCollator
from phi3v.data.encode import EncodedRows
from phi3v.errors import TrainingError
from phi3v.first_look import open_data
from phi3v.loading import load_base, load_processor
from phi3v.model.vision_phi3_v import Phi3VVisionTransformer
from phi3v.training import doctor
from phi3v.training.batch_checks import Ids, batch_faults, sequences_of, vocabulary_faults
from phi3v.training.meter import Meter
from phi3v.training.model_checks import gradient_faults, saved_faults, sight_faults, weight_faults
from phi3v.tuning import attach_lora

MakeRecipe = Callable[..., phi3v.Recipe]
Batch = dict[str, Any]


@pytest.fixture(scope="module")
def processor(world: Path) -> Any:
    return load_processor(world / "model")


@pytest.fixture
def example(make: MakeRecipe, processor: Any) -> Batch:
    """One sample of the recipe's first photo, unpadded, as the processor's own float crops."""
    return EncodedRows(open_data(make()).train, processor)[0]


def faults_of(examples: list[Batch], processor: Any, *, packed: bool = False) -> list[str]:
    collate: Any = PackedCollator(processor.image_token_id) if packed else Collator(processor.tokenizer.pad_token_id)
    return batch_faults(collate(examples), Ids.of(processor))


@pytest.mark.parametrize("packed", [False, True])
def test_a_sound_batch_has_no_fault(example: Batch, processor: Any, packed: bool) -> None:
    shorter = {name: value[:5] if value.ndim == 1 else value for name, value in copy.copy(example).items()}
    assert faults_of([example, example], processor, packed=packed) == []
    batch = Collator(0)([example, {**shorter, "labels": shorter["labels"]}])
    assert [len(one.ids) for one in sequences_of(batch)] == [len(example["input_ids"]), 5]


def tag_as_text(example: Batch, processor: Any) -> Batch:
    """Step 4: text and images processed apart."""
    text = "<|user|>\n<|image_1|>\nWhich colour?<|end|>\n<|assistant|>\nIt is red.<|end|>\n<|endoftext|>"
    ids = torch.tensor([1, *processor.tokenizer(text, add_special_tokens=False)["input_ids"]])
    return {"input_ids": ids, "labels": tail_of(ids, processor)}


def tail_of(ids: torch.Tensor, processor: Any) -> torch.Tensor:
    """Labels of what stands behind <|assistant|>."""
    place = ids.tolist().index(processor.tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
    return torch.cat([torch.full((place,), -100), ids[place:]])


def without_the_last(example: Batch, count: int) -> Batch:
    return {name: value[:-count] if value.ndim == 1 else value for name, value in example.items()}


def guides_form(example: Batch, processor: Any) -> Batch:
    """Step 2: no newline between <|end|> and <|assistant|>, no end of text."""
    convert = processor.tokenizer.convert_tokens_to_ids
    ids = example["input_ids"].tolist()
    end, assistant = ids.index(convert("<|end|>")), ids.index(convert("<|assistant|>"))
    keep = [*range(end + 1), *range(assistant, len(ids))]
    return {name: value[keep] if value.ndim == 1 else value for name, value in example.items()}


def raw_bytes(example: Batch) -> Batch:
    """Microsoft's training script: 8-bit arrays as they come from the decoder."""
    return {**example, "pixel_values": torch.randint(0, 256, example["pixel_values"].shape).float()}


def other_normalisation(example: Batch) -> Batch:
    """A processor of another tower, with means and deviations of 0.5: its pixels lie between CLIP's."""
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return {**example, "pixel_values": (example["pixel_values"] * std + mean - 0.5) / 0.5}


def start_twice(example: Batch) -> Batch:
    """A tokenizer that puts its <s> in front of a text that has one."""
    return {name: torch.cat([value[:1], value]) if value.ndim == 1 else value for name, value in example.items()}


DEFECTS: dict[str, tuple[Callable[[Batch, Any], Batch], str]] = {
    "tag as text": (tag_as_text, "tokenised as plain text"),
    "cut inside the image": (lambda e, p: without_the_last(e, 60), "images are cut"),
    "no image_sizes": (lambda e, p: {k: v for k, v in e.items() if k != "image_sizes"}, "without image_sizes"),
    "no pixels": (lambda e, p: {k: v for k, v in e.items() if k != "pixel_values"}, "no pixels are there"),
    "raw bytes": (lambda e, p: raw_bytes(e), "pixels lie between 0 and 255"),
    "other normalisation": (lambda e, p: other_normalisation(e), "by other means and deviations than CLIP's"),
    "<s> twice": (lambda e, p: start_twice(e), "has a <s> at position 1, where no text begins"),
    "labels are the ids": (lambda e, p: {**e, "labels": e["input_ids"].clone()}, "trains its prompt"),
    "image trained": (lambda e, p: {**e, "labels": e["input_ids"].clone()}, "trains image tokens"),
    "nothing trained": (lambda e, p: {**e, "labels": torch.full_like(e["labels"], -100)}, "trains nothing"),
    "no end": (lambda e, p: without_the_last(e, 1), "does not train the end of text"),
    "the guide's form": (guides_form, "no newline alone behind <|end|>"),
    "Microsoft's ids": (
        lambda e, p: {**e, "input_ids": torch.where(e["input_ids"] == p.image_token_id, -1, e["input_ids"])},
        "negative ids",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_of_a_batch_is_seen(example: Batch, processor: Any, name: str) -> None:
    plant, words = DEFECTS[name]
    planted = plant(example, processor)
    batch = {key: value[None] if value.ndim == 1 else value for key, value in planted.items()}
    found = batch_faults(batch, Ids.of(processor))
    assert any(words in fault for fault in found), found
    assert all("\n" not in fault for fault in found)


@pytest.mark.parametrize("pair", [("user", "assistant"), ("end", "endoftext"), ("end", "system"), ("user", "image")])
def test_swapped_control_tokens_are_seen(
    make: MakeRecipe, world: Path, tmp_path: Path, processor: Any, pair: tuple[str, str]
) -> None:
    """A tokenizer.json in which two of them have each other's ids."""
    shutil.copytree(world / "model", tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    read = json.loads(file.read_text())
    names = [f"<|{name}|>" for name in pair]
    one, other = (token for token in read["added_tokens"] if token["content"] in names)
    one["id"], other["id"] = other["id"], one["id"]
    read["added_tokens"].sort(key=lambda token: token["id"])
    file.write_text(json.dumps(read))
    swapped = load_processor(tmp_path / "swapped")
    sample = EncodedRows(open_data(make()).train, swapped)[0]
    found = [fault for fault in faults_of([sample], swapped) if "swapped" in fault]
    ids = processor.tokenizer.convert_tokens_to_ids(sorted(names))
    said = f"control tokens are swapped: {min(names)} is {ids[1]} and {max(names)} is {ids[0]}, which"
    assert len(found) == 1 and found[0].startswith(said), found


def test_a_vocabulary_of_its_own_is_not_a_swapped_one(example: Batch, processor: Any) -> None:
    """Each token at a place of its own, some at new places, no token of those; two placeholders that no row has."""
    samples, ids = list(sequences_of(Collator(0)([example]))), Ids.of(processor)
    assert vocabulary_faults(samples, ids) == []
    moved = [{name: 900 - number for name, number in ids.control.items()}, {**ids.control, "<|user|>": 900}, {}]
    one, other = "<|placeholder3|>", "<|placeholder9|>"
    moved.append({**ids.control, one: ids.control[other], other: ids.control[one]})
    for control in moved:
        assert vocabulary_faults(samples, replace(ids, control=control)) == []


def test_rows_that_hold_tags_as_text_are_noted(make: MakeRecipe, processor: Any) -> None:
    plain = list(open_data(make()).train)
    pasted = list(open_data(make(data={"prompt": "<|user|> which colour?"})).train)[:2]
    assert doctor.tag_notes(plain, processor.tokenizer) == []
    (note,) = doctor.tag_notes([*pasted, *plain], processor.tokenizer)
    assert note.startswith(f"2 of {2 + len(plain)} rows have") and "row 0: '<|user|> which colou'" in note


def test_padding_that_is_trained_is_seen(example: Batch, processor: Any) -> None:
    """Step 4: padding="max_length" and labels cloned from it."""
    batch = Collator(processor.tokenizer.pad_token_id)([example, without_the_last(example, 3)])
    batch["labels"][1, -3:] = batch["input_ids"][1, -3:]
    assert any("trains padding" in fault for fault in batch_faults(batch, Ids.of(processor)))


@pytest.fixture
def batch(example: Batch, processor: Any) -> Batch:
    return PackedCollator(processor.image_token_id)([example])


def backward(model: Any, batch: Batch) -> None:
    model.train()
    model(**batch, use_cache=False).loss.backward()


def test_gradients_say_what_trains(world: Path, batch: Batch) -> None:
    """Step 3: adapters on the tower alone, and re-entrant checkpoints below a frozen embedding."""
    from peft import LoraConfig, get_peft_model

    sound = attach_lora(load_base(world / "model"), {"r": 4})
    backward(sound, batch)
    assert gradient_faults(sound) == []
    assert gradient_faults(sound, scaled=True) == []
    for weight in sound.parameters():
        if weight.requires_grad:
            weight.data, weight.grad = weight.data.bfloat16(), weight.grad.bfloat16()  # what float16's scaling refuses
    assert any("gradients are bfloat16" in fault for fault in gradient_faults(sound, scaled=True))

    absent = int((~torch.isin(torch.arange(100), batch["input_ids"])).nonzero()[0])
    tokens = attach_lora(load_base(world / "model"), {"r": 4, "trainable_token_indices": [absent]})
    backward(tokens, batch)
    assert gradient_faults(tokens) == []  # a later step may hold that token

    guide = get_peft_model(load_base(world / "model"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    backward(guide, batch)
    found = gradient_faults(guide)
    assert any("no weight of the language model trains" in fault for fault in found)
    assert any(
        "2 of 6 trained parts get no gradient" in fault for fault in found
    )  # the layer whose output nobody reads

    reentrant = attach_lora(load_base(world / "model"), {"r": 4})
    reentrant.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    reentrant.get_base_model().disable_input_require_grads()  # which transformers sets up by itself nowadays
    with contextlib.suppress(RuntimeError):
        backward(reentrant, batch)
    assert any("get no gradient" in fault for fault in gradient_faults(reentrant))


def test_a_model_that_does_not_look_is_seen(world: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_base(world / "model")
    assert sight_faults(model, batch) == []
    embed = model.model.vision_embed_tokens
    plain = embed.forward
    monkeypatch.setattr(embed, "forward", lambda *given: (torch.zeros_like(plain(*given)[0]), plain(*given)[1]))
    assert any("does not look" in fault for fault in sight_faults(model, batch))
    monkeypatch.undo()
    forward = model.forward

    def clamps(input_ids: torch.Tensor, **rest: Any) -> Any:
        made = forward(input_ids=input_ids, **rest)
        input_ids.clamp_(max=3)  # as Microsoft's code does with negative ids
        return made

    monkeypatch.setattr(model, "forward", clamps)
    assert any("changes input_ids" in fault for fault in sight_faults(model, batch))


def test_weights_and_saved_copies_are_compared_with_files(world: Path, tmp_path: Path) -> None:
    model = attach_lora(load_base(world / "model"), {"r": 4}, tower="train", projector="train")
    assert weight_faults(model, world / "model") == []
    model.save_pretrained(tmp_path)
    assert saved_faults(model, tmp_path) == []
    with torch.no_grad():
        model.get_base_model().model.norm.weight[3] += 1e-3
        next(weight for name, weight in model.named_parameters() if "lora_A" in name)[0, 0] += 1.0
    assert weight_faults(model, world / "model") == [
        f"1 of 76 weights differ from {world / 'model'}, model.norm.weight for instance"
    ]
    model.get_base_model().lm_head.weight[5, 2] = float("inf")  # as float16 makes of what bfloat16 holds
    assert len(saved_faults(model, tmp_path)) == 1
    (spoilt, _) = weight_faults(model, world / "model")
    assert spoilt == f"1 of 76 weights of {world / 'model'} are no numbers in float32, lm_head.weight for instance"


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"lora": None, "vision": {"tower": "train", "projector": "train"}},
        {"vision": {"tower": "train"}, "training": {"packing": False, "gradient_checkpointing": True}},
    ],
)
def test_the_doctor_finds_nothing_on_sound_recipes(make: MakeRecipe, sections: dict[str, Any]) -> None:
    recipe = make(**sections)
    found = doctor.examine(recipe)
    assert found.passed and len(found.checks) == 6 and found.notes == [], found
    assert not Path(recipe.output).exists()


def test_the_doctor_sees_answers_of_other_rows(make: MakeRecipe, processor: Any) -> None:
    rows = list(open_data(make()).train)[:2]
    examples = [EncodedRows(rows, processor)[number] for number in range(2)]
    assert doctor.row_faults(rows, examples, processor, "last_assistant") == []
    assert len(doctor.row_faults(rows, examples[::-1], processor, "last_assistant")) == 2


def test_a_training_stops_before_its_first_step(make: MakeRecipe, world: Path, tmp_path: Path, monkeypatch) -> None:
    """The short form: base, batch and gradients are looked at by every training."""
    from phi3v.training import prepare, train

    plain = train.make_collators

    def trains_prompts(*given: Any) -> Any:
        step, padded = plain(*given)

        class TrainsPrompts(StepCollator):
            def __call__(self, examples: Any) -> list[Batch]:
                return super().__call__([{**one, "labels": one["input_ids"].clone()} for one in examples])

        return TrainsPrompts(**vars(step)), padded

    with monkeypatch.context() as patched:
        patched.setattr(train, "make_collators", trains_prompts)
        with pytest.raises(TrainingError, match="the first sample would teach something else: .*trains its prompt"):
            phi3v.train(make("prompts"))
    other = load_base(write_tiny_model(tmp_path / "other", seed=9))
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "load_base", lambda *given, **options: copy.deepcopy(other))
        with pytest.raises(TrainingError, match="weights differ from"):
            phi3v.train(make("weights"))
    from peft import LoraConfig, get_peft_model

    def on_the_tower(model: Any, *given: Any, **options: Any) -> Any:
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "attach_lora", on_the_tower)
        with pytest.raises(TrainingError, match="step 1: .*trained parts get no gradient|nothing trains"):
            phi3v.train(make("tower"))
    with monkeypatch.context() as patched:  # re-entrant checkpoints below an input that asks for no gradient
        patched.setattr(Phi3VVisionTransformer, "_input_embed_layer", "nowhere")
        twice = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        blind = make("blind", vision={"tower": "lora"}, training=twice)
        with pytest.raises(TrainingError, match=r"^step 1: 12 of 20 trained parts get no gradient, .*vision_model"):
            phi3v.train(blind)


def test_parts_that_see_are_looked_at_in_the_first_step_with_pictures(world: Path, batch: Batch) -> None:
    tuned = attach_lora(load_base(world / "model"), {"r": 4}, tower="lora")
    backward(tuned, batch)
    for name, weight in tuned.named_parameters():
        weight.grad = None if "vision_model" in name else weight.grad
    meter, given = Meter(), (SimpleNamespace(fp16=False), SimpleNamespace(global_step=6), None)
    look = doctor.FirstStepCallback(meter)
    for pictures in (0, 0, 1):
        meter.add(3, 90, pictures)
        with pytest.raises(TrainingError, match="^step 7: .*vision_model") if pictures else contextlib.nullcontext():
            look.on_pre_optimizer_step(*given, model=tuned)
