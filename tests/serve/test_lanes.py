"""Lanes: rows that cross the rope's limit answer as the model's own `generate` does, and nothing is left behind."""

import io
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import COLOURS, write_tiny_model

from phi3v.evaluation.answers import RecentImages
from phi3v.generate import ChatModel
from phi3v.serve.beside import Beside, Ended
from phi3v.serve.channel import read_message, write_message
from phi3v.serve.lanes import Asked, Lane, Lanes
from phi3v.serve.limits import Limits
from phi3v.serve.prepare import prepare, told
from phi3v.serve.protocol import Refusal
from phi3v.serve.served import Served, _remember_images
from phi3v.serve.worker import Worker

LIMIT = 64
"""Original context of the small model."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("short") / "model"
    chat = ChatModel.from_target(write_tiny_model(folder, original_max_position_embeddings=LIMIT), device="cpu")
    return Served(chat, None, RecentImages(chat.model))


def asked(served: Served, name: int, text: str, images: tuple[bytes, ...] = (), **more: Any) -> Asked:
    parts: list[Any] = [*range(len(images)), text]
    message = {"id": name, "turns": [{"role": "user", "parts": parts}], "max_tokens": 12, "temperature": 0, "top_p": 1}
    return prepare({**message, "seed": None, "stop": [], **more}, images, served, context=4000, default_tokens=20)


class Everyone(set):
    """Requests that are all wanted, whatever is taken out."""

    def __contains__(self, name: object) -> bool:
        return True


def work(lanes: Lanes, gone: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    turns = 0
    while lanes.busy:
        lanes.turn(gone.__contains__)
        turns += 1
        assert turns < 500


def texts(said: list[dict[str, Any]], count: int) -> list[str]:
    assert [one["id"] for one in said if one["is"] == "done"].count(0) == 1 and not [
        x for x in said if x["is"] == "fault"
    ]
    return ["".join(one["text"] for one in said if one["is"] == "piece" and one["id"] == name) for name in range(count)]


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_that_cross_the_ropes_limit_answer_as_generate(
    served: Served, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts around the limit, one of exactly its length: the crossing ones go through the model once more."""
    questions = ["a " * count for count in (2, 23, 24, 26, 27, 28, 29, 40, 4, 60)]
    expected, lengths = [], []
    for question in questions:
        chat = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        example = served.chat.encode(chat)
        lengths.append(len(example["input_ids"]))
        expected.append(served.chat.answer_encoded([example], batch_size=1, max_new_tokens=12)[0])
    crossing = [length for length in lengths if length <= LIMIT < length + 11]
    assert LIMIT in lengths and len(crossing) > 3 and max(lengths) > LIMIT
    said: list[dict[str, Any]] = []
    lanes = Lanes({"m": served}, batch=batch, tokens=4000, tell=lambda *told: said.extend(told))
    again: list[int] = []
    original = Asked.again
    monkeypatch.setattr(Asked, "again", lambda one: again.append(one.name) or original(one))
    lanes.lanes["m"].waiting.extend(asked(served, number, text) for number, text in enumerate(questions))
    work(lanes)
    assert texts(said, len(questions)) == expected
    assert len(again) == len(set(again)) and {lengths[name] for name in again} <= set(crossing) and len(again) > 2
    assert lanes.rows == 0 and lanes.lanes["m"]._batch.rows == []


def test_images_are_seen_once_and_cancelled_rows_leave(served: Served, tmp_path: Path) -> None:
    photos = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
        photos.append((tmp_path / f"{name}.png").read_bytes())
    said: list[dict[str, Any]] = []
    lanes = Lanes({"m": served}, batch=3, tokens=10**6, tell=lambda *told: said.extend(told))
    before = served.seen.computed
    lanes.lanes["m"].waiting.extend(asked(served, number, "What?", (photos[number % 2],)) for number in range(6))
    lanes.turn(lambda name: False)
    assert [one.name for one in lanes.lanes["m"].running] == [0, 1, 2] and lanes.rows == 6
    lanes.turn({1, 4}.__contains__)
    assert [one.name for one in lanes.lanes["m"].running] == [0, 2, 3] and lanes.rows == 4
    work(lanes, {1, 4})
    assert served.seen.computed == before + 2
    assert {one["id"] for one in said if one["is"] == "done"} == {0, 2, 3, 5}
    for number in (0, 2, 3, 5):
        text = "".join(one["text"] for one in said if one["is"] == "piece" and one["id"] == number)
        photo = Image.open(tmp_path / f"{list(COLOURS)[number % 2]}.png")
        assert text == served.chat.ask(photo, "What?", max_new_tokens=12)


def two_questions(file: Path) -> bytes:
    """A file with two requests about one photo; the photo."""
    photo = io.BytesIO()
    Image.new("RGB", (45, 35), "navy").save(photo, "PNG")
    parts = {"turns": [{"role": "user", "parts": [0, "What?"]}], "temperature": 0, "top_p": 1, "seed": None, "stop": []}
    with file.open("wb") as stream:
        for number in range(2):
            asking = {"do": "ask", "id": number, "model": "m", "max_tokens": 12, **parts}
            write_message(stream, asking, [photo.getvalue()])
    return photo.getvalue()


@pytest.mark.parametrize("beside", [False, True])
def test_images_may_be_seen_before_their_turn(
    served: Served, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's thread that prepares sends them through the tower, or a process beside it does, and nobody else."""
    photo = two_questions(tmp_path / "asked")
    threads: list[str] = []
    original = RecentImages.complete
    monkeypatch.setattr(
        RecentImages,
        "complete",
        lambda *given: threads.append(threading.current_thread().name) or original(*given),  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr("phi3v.serve.worker.may_fork", lambda: beside)
    said: list[dict[str, Any]] = []
    before = served.seen.computed
    with (tmp_path / "asked").open("rb") as source, (tmp_path / "told").open("wb") as drain:
        worker = Worker({"m": replace(served, sees_ahead=True)}, Limits(), source, drain)
        monkeypatch.setattr(worker, "tell", lambda *told: said.extend(told))
        monkeypatch.setattr(worker.lanes.lanes["m"], "_tell", lambda *told: said.extend(told))
        worker._wanted = Everyone()  # the source ends at once, which lets go of all
        worker.run()
    assert threads == ([] if beside else ["_prepare", "_prepare"])
    assert served.seen.computed == before + (0 if beside else 1)
    expected = served.chat.ask(Image.open(io.BytesIO(photo)), "What?", max_new_tokens=12)
    assert texts(said, 2) == [expected] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="the process is a fork, which only Linux has")
def test_the_process_beside_tells_what_it_refuses_and_ends_with_the_worker(served: Served, tmp_path: Path) -> None:
    """A refusal comes through whole, a fault loses one request, a dead process is noticed; then nothing is left."""
    two_questions(tmp_path / "asked")
    with (tmp_path / "asked").open("rb") as stream:
        message, images = read_message(stream) or ({}, [])

    def prepare_or_fail(message: dict[str, Any], images: Any) -> Asked:
        if message["id"] == 1:
            raise ZeroDivisionError
        if message["id"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        asked = prepare(message, images, served, context=400, default_tokens=20)
        asked.see()
        return asked

    with (tmp_path / "alone").open("wb") as alone:
        beside = Beside({"m": served}, prepare_or_fail, [alone])
        with pytest.raises(Refusal, match="image 1: it is not a readable") as told:
            beside.prepare(message, [images[0][:40]])
        assert (told.value.status, told.value.code) == (400, "invalid_image")
        with pytest.raises(RuntimeError):
            beside.prepare({**message, "id": 1}, images)
        asked = beside.prepare({**message, "stop": ["."], "seed": 3, "temperature": 1}, images)
        expected = prepare(message, images, served, context=400, default_tokens=20)
        expected.see()
        assert asked.example.keys() == expected.example.keys() and "image_features" in asked.example
        assert all(torch.equal(asked.example[name], expected.example[name]) for name in expected.example)
        assert (asked.name, asked.most, asked.stops, asked.choose is None) == (0, 12, ["."], False)
        with pytest.raises(Ended):
            beside.prepare({**message, "id": 2}, images)
        assert beside.dies()
        beside.process.join(5)
        assert beside.process.exitcode == -signal.SIGKILL
        other = Beside({"m": served}, prepare_or_fail, [alone])
        other.close()
        assert not other.dies()
        assert other.process.exitcode == 0 and not alone.closed and alone.write(b"still open here") > 0


@pytest.mark.parametrize(("device", "cores", "ahead"), [("cpu", 3, True), ("cpu", 2, False), ("meta", 3, False)])
def test_images_are_seen_ahead_where_a_core_is_free(
    served: Served, device: str, cores: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(type(served.chat.model), "device", torch.device(device))
    names = {"m": Served(served.chat, None)}
    _remember_images(names, served.chat.model)
    assert names["m"].sees_ahead == ahead


def test_tokens_of_a_batch_are_bounded(served: Served) -> None:
    lane = Lane(served, batch=8, tokens=200, tell=lambda *told: None)
    lane.waiting.extend(asked(served, number, "a " * 30) for number in range(4))  # each of some 90 tokens at most
    lane.waiting.append(asked(served, 4, "a " * 400))
    with torch.inference_mode():
        lane.turn(lambda name: False)
    assert len(lane.running) == 2 and len(lane.waiting) == 3


@pytest.mark.parametrize("temperature", [0, 1])
def test_scores_that_are_no_numbers_are_told(
    served: Served, temperature: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One row's are not: it is told so instead of an answer of nothing, and the other one is answered; twice."""
    said: list[dict[str, Any]] = []
    lanes = Lanes({"m": served}, batch=2, tokens=4000, tell=lambda *told: said.extend(told))
    original = type(served.chat.model).forward

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if kwargs["input_ids"].shape[1] > 1:
            output.logits[1] = torch.nan
        return output

    monkeypatch.setattr(type(served.chat.model), "forward", spoilt)
    for _ in range(2):
        said.clear()
        lanes.lanes["m"].waiting.extend(asked(served, number, "Hi", temperature=temperature) for number in range(2))
        work(lanes)
    (logged,) = [record.getMessage() for record in caplog.records]
    assert logged.startswith("a request to m failed: the model's scores are no numbers: ")
    (told,) = [one for one in said if one["id"] == 1]
    assert (told["is"], told["status"], told["code"]) == ("refused", 500, "model_scores") and "no numbers" in told[
        "message"
    ]
    assert said[-1]["is"] == "done" and said[-1]["id"] == 0


def test_a_step_that_fails_loses_its_requests_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    lanes = Lanes({"m": served}, batch=2, tokens=4000, tell=lambda *told: said.extend(told))
    lanes.lanes["m"].waiting.extend(asked(served, number, "Hi") for number in range(3))
    with monkeypatch.context() as broken:
        broken.setattr(type(served.chat.model), "forward", lambda *args, **kwargs: 1 / 0)
        lanes.turn(lambda name: False)
    assert [(one["is"], one["id"]) for one in said] == [("fault", 0), ("fault", 1), ("fault", 2)] and lanes.rows == 0
    lanes.lanes["m"].waiting.append(asked(served, 0, "Hi"))
    work(lanes)
    assert texts(said[3:], 1) == [served.chat.ask(None, "Hi", max_new_tokens=12)]


def test_costs_are_seen_before_they_are_spent(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text far beyond the context is not tokenised to its end, images beyond it are not decoded."""
    read: list[int] = []
    original = type(served.chat.processor.tokenizer).__call__

    def counted(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(len(text))
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(type(served.chat.processor.tokenizer), "__call__", counted)
    for text in ("<|image_1|>" * 900_000, "<|end|>" * 1_000_000, "\ufdd0" * 5_000_000):
        read.clear()
        with pytest.raises(Refusal, match="more than the 4000 tokens"):
            asked(served, 0, text)
        assert 0 < sum(read) < 1_000_000
    monkeypatch.setattr("phi3v.serve.prepare.encode_prompt", lambda *args, **kwargs: pytest.fail("it was decoded"))
    big = Image.new("1", (4000, 4000))
    buffer = io.BytesIO()
    big.save(buffer, "PNG")
    with pytest.raises(Refusal, match="images alone are more than the 4000 tokens"):
        asked(served, 0, "Hi", (buffer.getvalue(),) * 16)


def test_what_is_told_of_an_error_shows_nothing() -> None:
    line = "request, row 0: image embedded image does not decode: <_io.BytesIO at 0x7f12ab> in /tmp/x.py; replace it"
    assert told(ValueError(line)) == "it does not decode: <_io.BytesIO at ...> in ..."
