"""One model answers in two columns: each as it would alone, at its own cost, whatever is stopped or refused."""

import asyncio
import io
import threading

import pytest
import torch
from PIL import Image
from tiny_models import write_photos, write_tiny_model
from tiny_runs import make_recipe, make_run

from phi3v.data.encode import encode_prompt
from phi3v.errors import DataError, DeviceError, ImageError, TooLongError
from phi3v.generate import ChatModel
from phi3v.serve import page_guard
from phi3v.serve.side_by_side import BASE, MAX_PHOTOS, TUNED, Settings, SideBySide, Turn, _row

SHORT = Settings(max_new_tokens=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 6)
    return make_run(
        folder,
        make_recipe(
            folder,
            data={
                "train": str(folder / "photos" / "rows.jsonl"),
                "prompt": "What colour?",
                "answer": "It is {colour}.",
                "system": "Be brief.",
            },
        ),
    ).path


@pytest.fixture(scope="module")
def model(run):
    return ChatModel.from_target(run, device="cpu")


@pytest.fixture(scope="module")
def side(model):
    return SideBySide(model)


def picture(colour, size=(60, 40)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def last(turns):
    """The last of the turns that grow, each of which only adds to the one before."""
    seen = None
    for turn in turns:
        for column, answer in (seen.answers if seen else {}).items():
            assert turn.answers[column].startswith(answer)
        seen = turn
    return seen


def chat_of(turns, question, photos, column, system="Be brief."):
    """The same conversation as people write them."""
    messages = [{"role": "system", "content": system}]
    for turn in (*turns, Turn(question, photos, {})):
        parts = [{"type": "image", "image": Image.open(io.BytesIO(photo.image.data))} for photo in turn.photos]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
        if turn.answers:
            messages.append({"role": "assistant", "content": turn.answers[column]})
    return messages


def test_each_column_answers_as_its_model_does_alone_over_two_turns(run, side, model):
    alone = {
        TUNED: model,
        BASE: ChatModel.from_target(run, device="cpu", base_only=True),
    }
    red, blue = side.take("red.png", picture("red")), side.take("blue.png", picture("blue", (30, 90)))
    turns = ()
    for question, photos in (("What colour? <|end|>", (red,)), ("And these two, <|image_1|>?", (blue, red))):
        turn = last(side.answer(turns, question, photos, SHORT))
        assert turn.answering is None and list(turn.answers) == [TUNED, BASE] == list(side.columns)
        for column, one in alone.items():
            assert turn.answers[column] == one.answer([chat_of(turns, question, photos, column)], max_new_tokens=12)[0]
        turns = (*turns, turn)
    assert turns[0].answers[TUNED] != turns[0].answers[BASE]


def test_costs_are_the_lengths_of_the_prompts(side, model):
    photos = tuple(
        side.take(f"{colour}.png", picture(colour, size)) for colour, size in (("red", (700, 90)), ("blue", (9, 9)))
    )
    turns = (Turn("one </s>", photos[:1], {TUNED: "a long answer in words", BASE: ""}),)
    costs = side.check(turns, "two", photos[1:], SHORT)
    for column in side.columns:
        asked = Turn("two", photos[1:], {})
        row = _row(turns, column, asked, "Be brief.")
        assert costs[column].total == len(encode_prompt(row, model.processor)["input_ids"])
        assert costs[column].image == sum(photo.tokens for photo in photos)
    assert costs[TUNED].total > costs[BASE].total


def test_what_cannot_be_answered_is_one_line_and_nothing_is_begun(side):
    photo = side.take("a.png", picture("red"))
    told = {
        "there is no question": ((), " \n", (), SHORT),
        f"{MAX_PHOTOS + 1} photos, and the limit is {MAX_PHOTOS}": ((), "What?", (photo,) * (MAX_PHOTOS + 1), SHORT),
        "1,000,001 characters": ((), "a" * 1_000_001, (), SHORT),
        "the conversation holds half a character": ((), "half \ud83d", (), SHORT),
    }
    for line, asked in told.items():
        with pytest.raises(DataError, match=line) as caught:
            next(side.answer(*asked))
        assert "\n" not in str(caught.value)
    room = side.context - side.costs((), "What?", (photo,))[TUNED].total
    with pytest.raises(TooLongError, match=f"context is {side.context:,}: clear it"):
        next(side.answer((), "What?", (photo,), Settings(max_new_tokens=room + 1)))
    side.check((), "What?", (photo,), Settings(max_new_tokens=room))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"\xff\xd8\xff\xe0 nothing", "image a.jpg "),
        (b"", "image a.jpg "),
        (b"0" * 20_000_001, "20,000,001 bytes, more than the limit"),
        (picture("red", (1000, 1)), "too narrow"),
        (picture("red", (5000, 4001)), "5000x4001 pixels, more than the limit of 20000000; shrink it$"),
    ],
)
def test_a_photo_that_cannot_be_used_is_one_line_with_its_name(side, data, line):
    with pytest.raises(ImageError, match=line) as caught:
        side.take("a.jpg", data)
    assert "\n" not in str(caught.value) and str(caught.value).count("a.jpg") == 1
    assert "raise" not in str(caught.value)  # the page has no such option


def test_a_stopped_answer_leaves_no_work_behind_and_the_adapter_on(side, model):
    settings = Settings(max_new_tokens=4000)
    for column in side.columns:
        answers = side.answer((), "What?", (), settings)
        while not (turn := next(answers)).answers.get(column):
            pass
        answers.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("answer of")]
        assert len(turn.answers[column]) < 4000
    again = last(side.answer((), "What?", (), SHORT))
    assert again.answers[TUNED] == model.answer([chat_of((), "What?", (), TUNED)], max_new_tokens=12)[0]
    assert again.answers[TUNED] != again.answers[BASE]


def test_two_that_ask_at_once_get_what_each_gets_alone(side):
    questions = ["What colour?", "Which shape is it?"]
    alone = [last(side.answer((), question, (), SHORT)) for question in questions]
    found = {}

    def ask(question):
        found[question] = last(side.answer((), question, (), SHORT))

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[question] for question in questions] == alone


def test_used_up_memory_is_one_line(side, model, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "answer_one", fail)
    with pytest.raises(DeviceError, match="has not enough memory for this conversation"):
        last(side.answer((), "What?", (), SHORT))


def test_a_warm_answer_is_drawn(side):
    torch.manual_seed(0)
    cold = last(side.answer((), "What?", (), Settings(30)))
    warm = {last(side.answer((), "What?", (), Settings(30, 2.0))).answers[TUNED] for _ in range(3)}
    assert len(warm) == 3 and cold.answers[TUNED] not in warm


def test_a_model_without_an_adapter_and_one_that_hides_its_base_have_one_column(run, model):
    plain = SideBySide(ChatModel.from_target(run, device="cpu", base_only=True))
    assert plain.columns == (TUNED,) and plain.why_alone is None
    hiding = ChatModel.from_target(run, device="cpu")
    hiding.model.peft_config["default"].bias = "lora_only"
    alone = SideBySide(hiding)
    assert alone.columns == (TUNED,) and "does not hold its base" in (alone.why_alone or "")


def test_photos_are_shown_as_the_model_sees_them(side):
    name = "<img src=x onerror=alert(1)> ${7*7} {{ 7*7 }}.png"
    shown = side.seen([side.take(name, picture("red", (60, 30)))])
    assert "&lt;img src=x onerror=alert(1)&gt; ${7*7} {{ 7*7 }}.png, 60×30 pixels" in shown
    assert shown.count("<img ") == 3 and "together 313" in shown and "1 crop," in shown


def test_one_address_tries_few_passwords_at_a_time(monkeypatch):
    """What is guarded stands for Gradio. Another address is not held up, and the right password ends the count."""
    now = [0.0]
    monkeypatch.setattr(page_guard.time, "monotonic", lambda: now[0])

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200 if scope["query_string"] == b"right" else 400})

    guard = page_guard.PageGuard(page, None)

    def status(address, typed=b"wrong", **scope):
        told = []
        asked = {"type": "http", "method": "POST", "path": "/login", "headers": [], "query_string": typed}

        async def send(message):
            told.append(message)

        asyncio.run(guard(asked | {"client": (address, 1)} | scope, None, send))
        return told[0]["status"]

    most = page_guard.MOST_TRIES
    assert [status("a") for _ in range(most - 1)] == [400] * (most - 1)
    assert status("a", b"right") == 200 and [status("a") for _ in range(most)] == [400] * most
    assert status("a", b"right") == status("a", path="/login/") == 429 and status("a", method="GET") == 400
    assert status("b") == 400 and status("b", b"right") == 200
    now[0] = page_guard.TRY_SECONDS + 1
    assert status("a") == 400 and status("a", b"right") == 200
