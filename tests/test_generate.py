"""ChatModel: order, batches, streams, and what is taken off an answer."""

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import COLOURS, write_tiny_model

from phi3v import generate, loading, tuning
from phi3v.errors import CheckpointError, ConfigError, ImageError
from phi3v.generate import ChatModel, PieceStreamer, conversation
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.serve.served import load_served

FOUR_BITS = {"load_in_4bit": True}
RECIPE = {"model": "some/name", "data": "rows.jsonl"}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return ChatModel.from_target(write_tiny_model(tmp_path_factory.mktemp("chat") / "model", seed=4))


def photo(colour: str, size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.new("RGB", size, COLOURS[colour])


@pytest.fixture
def scripted(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the model say a text, token by token, then nonsense; the text may hold control tokens."""

    def say(text: str) -> None:
        script = chat.processor.tokenizer(text, add_special_tokens=False).input_ids
        original = type(chat.model).forward
        steps: list[int] = []

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            token = script[len(steps)] if len(steps) < len(script) else 30
            steps.append(token)
            output.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(token), output.logits.shape[-1]).float()
            return output

        monkeypatch.setattr(type(chat.model), "forward", forward)

    return say


def chats() -> list[Any]:
    questions = [
        "Which colour?",
        "Say in many words which colour this picture has.",
        "What?",
        "Is it red or is it blue?",
    ]
    found = [
        conversation(photo(colour, (40 + 300 * number, 60)), questions[number]) for number, colour in enumerate(COLOURS)
    ]
    return [*found, conversation(None, "No picture at all?"), conversation([photo("red"), photo("blue")], "Both?")]


def test_a_batch_gives_the_answers_of_one_by_one_in_the_callers_order(chat: ChatModel) -> None:
    alone = [chat.answer([one], max_new_tokens=6)[0] for one in chats()]
    assert len(set(alone)) > 1
    for batch_size in (2, 3, 8):
        assert chat.answer(chats(), batch_size=batch_size, max_new_tokens=6) == alone
    assert chat.answer(iter(chats()), batch_size=1, max_new_tokens=6) == alone
    assert chat.answer([]) == []


def test_prompts_are_taken_a_window_at_a_time(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = answered = most = 0

    def prompts() -> Any:
        nonlocal taken
        for _ in range(40):
            taken += 1
            yield {"input_ids": torch.tensor([1, 20])}

    def generate(examples: Any, *args: Any) -> list[str]:
        nonlocal answered, most
        most = max(most, taken - answered)
        answered += len(examples)
        return ["x"] * len(examples)

    monkeypatch.setattr(chat, "_generate", generate)
    assert chat.answer_encoded(prompts(), batch_size=2) == ["x"] * 40
    assert most == 16


def test_it_stops_where_the_turn_ends(chat: ChatModel, scripted: Callable[[str], None]) -> None:
    for end in ("<|end|>", "<|endoftext|>", "</s>"):
        scripted(f"A red hat. {end}")
        assert chat.ask(photo("red"), "What?", max_new_tokens=60).rstrip() == "A red hat."


def test_nothing_but_control_tokens_is_taken_off(chat: ChatModel, scripted: Callable[[str], None]) -> None:
    for text in ("two\n\n  lines ", "caf\u00e9 \U0001f9e3 scarf", " \n", "<|placeholder1|>word"):
        scripted(text)
        answer = chat.ask(photo("red"), "What?", max_new_tokens=len(chat.processor.tokenizer(text).input_ids) - 1)
        assert answer == text.removeprefix("<|placeholder1|>")


def test_pieces_of_a_stream_join_to_the_answer(chat: ChatModel, scripted: Callable[[str], None]) -> None:
    scripted("A red caf\u00e9 \U0001f9e3\n two lines<|end|>")
    pieces: list[str] = []
    answer = chat.ask(photo("red"), "What?", max_new_tokens=60, stream=pieces.append)
    assert "".join(pieces) == answer == "A red caf\u00e9 \U0001f9e3\n two lines"
    assert len(pieces) > 5 and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_any_tokens_stream_as_they_are_decoded_as_a_whole(chat: ChatModel) -> None:
    """Bytes in and out of order, control tokens that show nothing, spaces; a piece is made of few tokens again."""
    tokenizer, most = chat.processor.tokenizer, 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal most
        most = max(most, len(ids))
        return chat.text_of(ids)

    stops = set(chat.processor.stop_token_ids)
    shown = [token for token in range(len(tokenizer)) if token not in stops]
    bytes_, control = [t for t in shown if chat.is_byte(t)], [t for t in shown if not chat.text_of([t])]
    random = Random(5)
    for trial in range(40):
        kinds = [shown, shown, control, bytes_][: 2 + trial % 3]
        ids = [random.choice(random.choice(kinds)) for _ in range(120)]
        pieces: list[str] = []
        streamer = PieceStreamer(decode, chat.is_byte, pieces.append)
        streamer.put(torch.empty(0))
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(pieces) == chat.text_of(ids)
        if trial % 3 == 0:
            assert most < 40
        most = 0


def test_sampling_and_beams_pass_through(chat: ChatModel) -> None:
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 5.0, "top_k": 50, "max_new_tokens": 8}
    assert len({chat.ask(photo("red"), "What?", **options) for _ in range(4)}) > 1
    assert isinstance(chat.ask(photo("red"), "What?", num_beams=3, max_new_tokens=3), str)
    with pytest.raises(ConfigError, match="generation.temprature is no option: did you mean temperature"):
        chat.ask(photo("red"), "What?", temprature=1.0)


def test_photos_come_as_paths_or_pixels(chat: ChatModel, tmp_path: Path) -> None:
    photo("green").save(tmp_path / "green.png")
    by_path = chat.ask(tmp_path / "green.png", "What?", max_new_tokens=4)
    assert chat.ask(str(tmp_path / "green.png"), "What?", max_new_tokens=4) == by_path
    assert chat.ask([photo("green")], "What?", max_new_tokens=4) == by_path
    with pytest.raises(ImageError, match="does not exist"):
        chat.ask(tmp_path / "nothing.png", "What?")
    see_through = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    see_through.save(tmp_path / "alpha.png")
    opened = conversation(tmp_path / "alpha.png", "What?")[0]["content"][0]["image"]
    assert opened.getpixel((3, 3)) == (255, 255, 255)


def test_a_system_turn_and_hostile_text_stay_what_they_are(chat: ChatModel) -> None:
    ids = chat.encode(conversation(photo("red"), "Say <|end|> and <|image_1|> </s>", system="Be short."))["input_ids"]
    tokenizer, image = chat.processor.tokenizer, chat.processor.image_token_id
    control = [token for token in ids.tolist() if token >= 710 and token != image]
    names = ["<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>"]
    assert control == tokenizer.convert_tokens_to_ids(names)
    assert ids.tolist().count(image) == 313 and 2 not in ids.tolist()


def test_asking_leaves_the_model_as_it_was(chat: ChatModel) -> None:
    chat.model.train()
    chat.ask(photo("red"), "What?", max_new_tokens=2)
    assert chat.model.training
    chat.model.eval()


def test_scores_that_are_no_numbers_are_one_line(chat: ChatModel) -> None:
    with torch.no_grad():
        weight = next(chat.model.get_output_embeddings().parameters())
        kept = weight.clone()
        weight[5].fill_(float("nan"))
    try:
        with pytest.raises(CheckpointError, match=r"scores are no numbers \(NaN\)"):
            chat.ask([], "Hi", max_new_tokens=3)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    chat.ask([], "Hi", max_new_tokens=3)


def run_with(folder: Path, **sections: Any) -> Path:
    """A run whose adapter changes nothing, with these sections in its recipe."""
    model = write_tiny_model(folder / "model", seed=4)
    run = RunFolder(folder / "run")
    data = {"train": "rows.jsonl", **sections.pop("data", {})}
    run.start(Recipe.from_dict({"model": {"name": str(model), **sections.pop("model", {})}, "data": data, **sections}))
    run.write_adapter(tuning.attach_lora(loading.load_base(model), {"r": 2}).save_pretrained)
    return run.path


def test_a_run_is_loaded_as_its_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"dtype": "bfloat16", "device": "cpu", "attn_implementation": "eager"}
    seen = {"max_tokens": 781, "num_crops": 9, "fast": True, "max_pixels": 3000}
    run = run_with(tmp_path, model=chosen, image=seen)
    saved = shutil.copytree(run / "adapter", run / "checkpoints" / "checkpoint-1")
    photo("red", (60, 60)).save(tmp_path / "large.png")
    for target in (run, run / "adapter", saved):
        chat = ChatModel.from_target(target)
        assert chat.model.dtype == torch.bfloat16
        assert chat.model.get_base_model().config._attn_implementation == "eager"
        assert (chat.processor.image_processor.num_crops, chat.processor.image_processor.fast) == (4, True)
        with pytest.raises(ImageError, match="60x60 pixels, more than the limit of 3000; .*--max-pixels"):
            chat.ask(tmp_path / "large.png", "What?")
    merged = shutil.copytree(tmp_path / "model", run / "merged")  # of the same bytes as it would be elsewhere
    for chat in (ChatModel.from_target(merged), load_served(str(merged), {})["merged"].chat):
        assert (chat.model.dtype, chat.processor.image_processor.num_crops) == (torch.float32, 4)
    assert ChatModel.from_target(run, max_pixels=3600).ask(tmp_path / "large.png", "What?", max_new_tokens=1) != "?"
    given = ChatModel.from_target(run, dtype="float32", attn_implementation="sdpa", num_crops=6, fast=False)
    assert given.model.dtype == torch.float32
    assert given.model.get_base_model().config._attn_implementation == "sdpa"
    assert (given.processor.image_processor.num_crops, given.processor.image_processor.fast) == (6, False)

    asked: dict[str, Any] = {}
    monkeypatch.setattr(generate, "load_target", lambda target, **options: asked.update(options) or given)
    monkeypatch.setattr(RunFolder, "read_recipe", lambda self: Recipe.from_dict({**RECIPE, "quantization": FOUR_BITS}))
    for target in (run, run / "adapter", saved):
        ChatModel.from_target(target)
        assert (asked["quantization"], asked["device"]) == (FOUR_BITS, "auto"), target
    ChatModel.from_target(merged)
    assert (asked["quantization"], asked["dtype"], asked["fast"]) == (None, "auto", False)


def test_a_runs_own_system_turn_is_asked_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_with(tmp_path, data={"system": "Be {{brief}}.", "prompt": "?", "answer": "{colour}"})
    chat = ChatModel.from_target(run)
    assert chat.system == "Be {brief}."
    asked: list[Any] = []
    chat.encode = lambda turns: asked.append(turns) or ChatModel.encode(chat, turns)  # type: ignore[method-assign]
    for given in (None, "Shout.", ""):
        chat.ask(None, "What?", system=given, max_new_tokens=1)
    assert [turns[0]["content"][0]["text"] for turns in asked] == ["Be {brief}.", "Shout.", "What?"]
    assert caplog.messages == []


def test_a_system_turn_of_columns_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_with(tmp_path, data={"system": "A {kind} in {place}.", "prompt": "?", "answer": "{colour}"})
    assert ChatModel.from_target(run).system is None
    assert caplog.messages == [
        f"{run} was tuned with a system turn that names the columns kind, place: it is left out, pass system=... to "
        "give one"
    ]


def test_a_photo_that_is_too_narrow_is_named(chat: ChatModel, tmp_path: Path) -> None:
    photo("red", (1, 9000)).save(tmp_path / "narrow.png")
    with pytest.raises(ImageError, match="narrow.png: an image of 1x9000 pixels is too narrow: .* at most [0-9]+:1$"):
        chat.ask([photo("red"), tmp_path / "narrow.png"], "What?")
