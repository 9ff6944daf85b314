"""The running batch: one-by-one answers, losses from the same pass, rows that make room, and what `generate` keeps."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from PIL import Image
from tiny_models import COLOURS, write_tiny_model
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from phi3v.data.collate import Collator
from phi3v.data.encode import encode, encode_prompt
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.evaluation import answers
from phi3v.evaluation.answers import RecentImages, answer_rows
from phi3v.evaluation.engine import Engine, adapter_reason, settings_reason
from phi3v.evaluation.running_batch import RunningRow, losses_of
from phi3v.evaluation.running_cache import RoomyLayer, fewest_moves, joined_rows, padding_mask
from phi3v.generate import ChatModel

LIMIT = 64
"""Original context of the small model whose rows cross it."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, colour in enumerate(COLOURS.values()):
        Image.new("RGB", (40 + 200 * number, 60), colour).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    found = ChatModel.from_target(write_tiny_model(tmp_path_factory.mktemp("model") / "model", seed=4), device="cpu")
    found.processor.image_processor.num_crops = 4
    return found


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """A model whose rope changes at 64 tokens."""
    folder = tmp_path_factory.mktemp("short") / "model"
    return ChatModel.from_target(write_tiny_model(folder, original_max_position_embeddings=LIMIT), device="cpu")


def make_row(index: int, question: str, answer: str, *images: Path) -> Row:
    asked = Message("user", (*(ImagePart(place) for place in range(len(images))), TextPart(question)))
    said = Message("assistant", (TextPart(answer),))
    return Row((asked, said), tuple(ImageRef(str(image)) for image in images), {}, "rows", index)


@pytest.fixture(scope="module")
def rows(photos: Path) -> list[Row]:
    """Eleven rows of several grids of crops, of two images and of none, three about the same photo."""
    images: list[list[int]] = [[0], [1], [2], [3], [], [0, 1], [1], [], [1], [2, 0], [3]]
    words = ["Which colour?", "Say in many words which colour this picture has.", "What?"]
    return [
        make_row(number, words[number % 3] * (number % 4 + 1), "It is red. " * (number % 5 + 1), *files)
        for number, files in enumerate([[photos / f"{one}.png" for one in those] for those in images])
    ]


def alone(chat: ChatModel, rows: list[Row], tokens: int) -> list[str]:
    """Answers of the model's own `generate`, one by one."""
    prompts = [encode_prompt(row, chat.processor) for row in rows]
    return [chat.answer_encoded([one], batch_size=1, max_new_tokens=tokens)[0] for one in prompts]


@pytest.fixture
def widths(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of all that goes through the model."""
    seen: list[tuple[int, int]] = []
    original = type(chat.model).forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(chat.model), "forward", forward)
    return seen


@pytest.fixture
def early_ends(chat: ChatModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers end at very different tokens: more tokens end one than those of the template."""
    prompts = [encode_prompt(row, chat.processor) for row in rows]
    said = [chat.processor.tokenizer(chat.answer_encoded([one], max_new_tokens=12)[0]).input_ids for one in prompts]
    more = {ids[2 + 3 * (number % 3)] for number, ids in enumerate(said) if len(ids) > 8}
    stops = sorted({*chat.processor.stop_token_ids, *more})
    monkeypatch.setattr(type(chat.processor), "stop_token_ids", stops)
    monkeypatch.setitem(chat.__dict__, "stops", frozenset(stops))


@pytest.mark.usefixtures("early_ends")
def test_answers_are_those_of_one_by_one_and_rows_that_end_make_room(
    chat: ChatModel, rows: list[Row], widths: list[tuple[int, int]]
) -> None:
    expected = alone(chat, rows, 12)
    lengths = [len(chat.processor.tokenizer(text, add_special_tokens=False).input_ids) for text in expected]
    assert len(set(lengths)) > 2, "the answers are not ragged"
    for batch_size in (1, 3, 16):
        widths.clear()
        found = answer_rows(chat.model, chat.processor, rows, batch_size=batch_size, max_new_tokens=12, expected=False)
        assert found.texts == expected and found.ways == {"together": len(rows)}
        prompts = [shape for shape in widths if shape[1] > 1]
        assert sum(rows for rows, _ in prompts) == len(rows) and max(rows for rows, _ in widths) <= batch_size
        if batch_size == 3:
            steps = len(widths) - len(prompts)
            order = sorted(range(len(rows)), key=lambda at: -lengths[at])
            assert len(prompts) > 4, "no row came in while others were being answered"
            assert steps < sum(lengths[at] + 1 for at in order[::3]), "no better than the best fixed batches"
            assert any(count > 1 for count, columns in widths if columns == 1)


def test_losses_come_from_the_same_pass_row_by_row(
    chat: ChatModel, rows: list[Row], widths: list[tuple[int, int]]
) -> None:
    found = answer_rows(chat.model, chat.processor, rows, batch_size=4, max_new_tokens=5)
    assert sum(count for count, columns in widths if columns > 1) == len(rows), "a prompt went through twice"
    assert found.texts == alone(chat, rows, 5) and found.ways == {"together": len(rows)}
    collate = Collator(chat.processor.tokenizer.pad_token_id)
    for row, loss, tokens in zip(rows, found.losses, found.tokens, strict=True):
        batch = collate([encode(row, chat.processor)])
        with torch.no_grad():
            logits = chat.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        wanted = batch["labels"][0, 1:]
        each = torch.nn.functional.cross_entropy(logits[0, :-1], wanted, ignore_index=-100, reduction="sum")
        assert loss == pytest.approx(float(each), rel=1e-5) and tokens == int((wanted != -100).sum())
    assert found.loss == pytest.approx(sum(found.losses) / sum(found.tokens))


def test_a_prompt_is_cached_as_if_no_answer_stood_behind_it(chat: ChatModel, rows: list[Row]) -> None:
    """Whole tensors: keys and values of a batch of samples, cut to their prompts and moved into a running batch."""
    engine = Engine(chat, batch_size=4, max_new_tokens=5)
    samples = [(number, encode(rows[number], chat.processor)) for number in (0, 1, 4, 5)]
    with torch.inference_mode():
        batch = engine.running()
        running, later = ([RunningRow(number) for number, _ in some] for some in (samples[:2], samples[2:]))
        lengths, cache = batch.prefill(running, [one for _, one in samples[:2]])
        first = joined_rows(None, [], [], cache, lengths, 3)
        more, cache = batch.prefill(later, [one for _, one in samples[2:]])
        joined = joined_rows(first, [1], [lengths[1]], cache, more, 3)
        assert [row.cached for row in [*running, *later]] == [*lengths, *more]
        for place, number in enumerate((1, 4, 5)):
            fresh = DynamicCache()
            prompt = {name: value[None] for name, value in encode_prompt(rows[number], chat.processor).items()}
            images = {name: prompt[name][0] for name in ("pixel_values", "image_sizes") if name in prompt}
            logits = chat.model(input_ids=prompt["input_ids"], past_key_values=fresh, **images).logits[0, -1]
            for one, other in zip(joined.layers, fresh.layers, strict=True):
                for name in ("keys", "values"):
                    alone, moved = getattr(other, name)[0], getattr(one, name)[place]
                    torch.testing.assert_close(moved[:, -alone.shape[1] :], alone, rtol=1e-5, atol=1e-6)
                    assert not moved[:, : -alone.shape[1]].any()
            chosen = [running[1], *later][place].new
            logits[chat.model.config.image_token_id] = -torch.inf
            assert chosen == [int(logits.argmax())]


def test_rows_that_may_cross_the_ropes_limit_are_for_generate(short: ChatModel) -> None:
    words = [2, 22, 25, 20, 40, 4, 60]
    rows = [make_row(number, "a " * count, "red") for number, count in enumerate(words)]
    lengths = [len(encode_prompt(row, short.processor)["input_ids"]) for row in rows]
    crossing = [length <= LIMIT < length + 12 for length in lengths]
    assert 0 < sum(crossing) < len(rows) and any(length > LIMIT for length in lengths)
    found = answer_rows(short.model, short.processor, rows, batch_size=3, max_new_tokens=12)
    assert found.texts == alone(short, rows, 12)
    assert found.ways == {"together": len(rows) - sum(crossing), "generate": sum(crossing)}
    again = answer_rows(short.model, short.processor, rows, batch_size=1, max_new_tokens=1)
    assert again.losses == pytest.approx(found.losses, rel=1e-5) and again.tokens == found.tokens


@pytest.fixture
def settings(chat: ChatModel) -> Iterator[Callable[..., None]]:
    """Changes the model's own settings of generation."""
    before = chat.model.generation_config
    yield lambda **changes: setattr(
        chat.model, "generation_config", GenerationConfig(**{**before.to_diff_dict(), **changes})
    )
    chat.model.generation_config = before


def test_a_models_own_settings_of_generation_are_kept(
    chat: ChatModel, rows: list[Row], settings: Callable[..., None]
) -> None:
    plain = alone(chat, rows[:4], 6)
    settings(repetition_penalty=5.0)
    changed = alone(chat, rows[:4], 6)
    found = answer_rows(chat.model, chat.processor, rows[:4], batch_size=2, max_new_tokens=6)
    assert found.texts == changed != plain and found.ways == {"generate": 4} and all(found.tokens)
    settings(suppress_tokens=[chat.processor.tokenizer(plain[0]).input_ids[-1]], do_sample=True, temperature=5.0)
    found = answer_rows(chat.model, chat.processor, rows[:4], batch_size=2, max_new_tokens=6)
    assert found.texts == alone(chat, rows[:4], 6) != plain and found.ways == {"together": 4}


def test_settings_that_only_generate_knows_are_named() -> None:
    published = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0, "do_sample": True, "top_p": 0.9}
    assert settings_reason(GenerationConfig(**published, num_beams=1, repetition_penalty=1.0, use_cache=True)) is None
    for name, value in (("num_beams", 4), ("no_repeat_ngram_size", 3), ("use_cache", False), ("min_new_tokens", 2)):
        assert settings_reason(GenerationConfig(**published, **{name: value})) == f"{name} is {value}"


def test_adapters_that_lengthen_prompts_are_for_generate(tmp_path: Path) -> None:
    chat = ChatModel.from_target(write_tiny_model(tmp_path / "model"), device="cpu")
    tuned = get_peft_model(chat.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert adapter_reason(tuned) == "the adapter is of type PROMPT_TUNING"
    assert Engine(ChatModel(tuned, chat.processor), batch_size=1, max_new_tokens=1).reason is not None


def test_an_image_goes_through_the_tower_once(
    chat: ChatModel, rows: list[Row], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    tower = type(chat.model.model.vision_embed_tokens)
    original = tower.forward

    def forward(self: Any, pixels: torch.Tensor, sizes: Any, *rest: Any) -> Any:
        looked.append(len(sizes))
        return original(self, pixels, sizes, *rest)

    monkeypatch.setattr(tower, "forward", forward)
    answer_rows(chat.model, chat.processor, rows, batch_size=4, max_new_tokens=2)
    assert looked == [1] * 4, "four photos, twelve places, losses and answers"
    two = RecentImages(chat.model, limit_bytes=1)
    for place in (0, 0, 1, 0):
        two.complete(rows[place], encode_prompt(rows[place], chat.processor))
    assert two.computed == 3, "a memory that is full forgets what came first"


def test_few_examples_are_in_memory_however_many_rows_there_are(
    chat: ChatModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, most, answered = 0, 0, 0
    original = answers._Window._encoded

    def encoded(self: Any, at: int) -> Any:
        nonlocal made, most
        made += 1
        most = max(most, made - answered)
        return original(self, at)

    def count(done: int) -> None:
        nonlocal answered
        answered = done

    monkeypatch.setattr(answers._Window, "_encoded", encoded)
    text = [rows[4]] * 60
    answer_rows(chat.model, chat.processor, text, batch_size=2, max_new_tokens=1, expected=False, on_row=count)
    assert made == 60 and most <= 2 + 2 + 3, "a batch, as many that wait, and those that are on their way"


def test_examples_of_joined_rows_and_masks() -> None:
    def cache(*rows: list[float]) -> DynamicCache:
        made = DynamicCache()
        states = torch.tensor(rows)[:, None, :, None]
        made.update(states, -states, 0)
        return made

    running, fresh = cache([0.0, 1, 2], [3, 4, 5]), cache([6.0, 7, 8, -1, -1], [9, 10, 11, 12, 13], [1, 1, 1, 1, 1])
    joined = joined_rows(running, [1], [3], fresh, [3, 5, 0], 2)
    keys = joined.layers[0].keys
    assert keys[:, 0, :, 0].tolist() == [[0, 0, 3, 4, 5], [0, 0, 6, 7, 8], [9, 10, 11, 12, 13]]
    assert torch.equal(joined.layers[0].values, -keys) and joined.get_seq_length() == 5
    assert type(fresh.layers[0]) is DynamicLayer and fresh.get_seq_length() == 0, "its memory is given back"
    whole = joined.layers[0]._all[0]
    for column in range(4):
        step = torch.full((3, 1, 1, 1), 20.0 + column)
        keys, _ = joined.update(step, step, 0)
        assert (joined.layers[0]._all[0] is whole) == (column < 2), "written in place while there is room"
    assert isinstance(joined.layers[0], RoomyLayer)
    assert keys[1, 0, :, 0].tolist() == [0, 0, 6, 7, 8, 20, 21, 22, 23]
    assert padding_mask([2, 3], 1, torch.device("cpu")).tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    halves = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    losses, counts = losses_of(halves, torch.tensor([[-100, 1, -100], [-100, 0, 1]]))
    assert counts == [1, 2] and losses == pytest.approx([0.6931, 0.6931 + 2.1269], abs=1e-4)


def test_answers_that_outgrow_their_room_go_on(
    chat: ChatModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_room", 2)
    found = answer_rows(chat.model, chat.processor, rows[:3], batch_size=3, max_new_tokens=9, expected=False)
    assert found.texts == alone(chat, rows[:3], 9)


def test_rows_come_and_go_in_place_and_leave_nothing_behind() -> None:
    """Whole tensors against lists, over 200 joins: rows that left held infinities, which no other row may see."""
    generator = torch.Generator().manual_seed(3)
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    rows: list[list[float]] = []
    cache: Any = None
    ways = {"in place": 0, "anew": 0}
    for turn in range(200):
        kept = [place for place in range(len(rows)) if number(0, 8)]
        if turn % 2:
            ascending, kept = kept, fewest_moves(kept)
            assert sorted(kept) == ascending
            stay = sum(place < len(kept) for place in ascending)
            assert sum(place == row for place, row in enumerate(kept)) == stay  # what has a place in front keeps it
        for place in set(range(len(rows))) - set(kept):
            cache.layers[0].keys[place] = torch.inf
        prompts = [[float(number(1, 9)) for _ in range(number(3, 12))] for _ in range(min(number(0, 4), 6 - len(kept)))]
        if not kept and not prompts:
            prompts = [[float(turn)]]
        fresh = DynamicCache()
        padded = torch.tensor([one + [-1.0] * (12 - len(one)) for one in prompts]).reshape(len(prompts), 1, 12, 1)
        fresh.update(padded, -padded, 0)
        before = None if cache is None else cache.layers[0]._all[0]
        lengths = [len(rows[place]) for place in kept]
        cache = joined_rows(cache, kept, lengths, fresh if prompts else None, [len(one) for one in prompts], 4)
        ways["in place" if cache.layers[0]._all[0] is before else "anew"] += 1
        rows = [*(rows[place] for place in kept), *prompts]
        for _ in range(number(1, 4)):
            step = torch.tensor([float(number(1, 9)) for _ in rows])[:, None, None, None]
            keys, values = cache.update(step, -step, 0)
            rows = [[*row, one] for row, one in zip(rows, step.flatten().tolist(), strict=True)]
        widest = max(len(row) for row in rows)
        assert keys[:, 0, :, 0].tolist() == [[0.0] * (widest - len(row)) + row for row in rows]
        assert torch.equal(values, -keys) and cache.get_seq_length() == widest
    assert min(ways.values()) > 20, ways
