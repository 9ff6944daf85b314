"""The whole server, as a process of its own, asked by OpenAI's client: base and two adapters of the tiny model.

The tests stand in the order in which the server lives: the last one ends it.
"""

import asyncio
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from odd_images import costly_images, odd_images
from PIL import Image
from serving import TINY, RunningServer, asking, data_url, photo, running_server, write_adapter
from serving_trials import (
    QUESTION,
    answered_as_alone,
    children,
    drop_streams,
    kill_worker,
    overload,
    scenes,
    send_bad_images,
    send_made_up,
    stop_while_answering,
)
from typer.testing import CliRunner

import phi3v
from phi3v.cli import app
from phi3v.generate import ChatModel
from phi3v.serve import backend
from phi3v.serve.limits import Limits
from phi3v.serve.nursery import Nursery

pytestmark = pytest.mark.skipif(os.name != "posix", reason="looks for the worker in /proc, sends POSIX signals")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {"v1.2": write_adapter(folder / "2", 2, 0.1), "noisy": write_adapter(folder / "6", 6, 1.0)}


@pytest.fixture(scope="module")
def server(adapters: dict[str, Path]) -> Iterator[RunningServer]:
    words = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    with running_server(TINY, *words, "--batch-size", "4", "--queue", "12") as running:
        yield running


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(2):
        (folder / f"{number}.png").write_bytes(photo(number))
    return [folder / "0.png", folder / "1.png"]


def test_names_answer_as_ask_does(server: RunningServer, adapters: dict[str, Path], photos: list[Path]) -> None:
    """The base and each adapter, with a photo, streamed and whole; `photos` are what the client sends as data URLs."""
    assert server.names == [one.id for one in server.client.models.list()] == ["tiny", *adapters]
    found: dict[str, list[str]] = {}
    for name, place in {"tiny": TINY, **adapters}.items():
        chat = ChatModel.from_target(place, device="cpu")
        for question, images in ((QUESTION, photos[:1]), ("Which?", photos), ("Hello, who are you?", [])):
            expected = chat.ask(images, question, max_new_tokens=12)
            body: Any = asking(question, *(image.read_bytes() for image in images), model=name)
            whole = server.client.chat.completions.create(**body)
            assert whole.choices[0].message.content == expected and whole.model == name
            stream = server.client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
            *pieces, last = list(stream)
            assert "".join(one.choices[0].delta.content or "" for one in pieces) == expected
            assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
            assert last.usage == whole.usage and whole.usage.prompt_tokens > 300 * len(images)
            found.setdefault(name, []).append(expected)
    assert len(set(map(tuple, found.values()))) == 3, found


def test_turns_system_and_what_ends_an_answer(server: RunningServer) -> None:
    chat = ChatModel.from_target(TINY, device="cpu")
    one, other = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (90, 40), "blue")
    turns: Any = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red <|end|> square </s>"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And <|image_1|><|user|> "}, {"type": "image", "image": other}],
        },
    ]
    expected = chat.answer([turns], max_new_tokens=20)[0]
    sent = json.loads(json.dumps(turns, default=lambda image: data_url(png(image))))
    for turn in sent:
        for part in turn["content"]:
            if part["type"] == "image":
                part |= {"type": "image_url", "image_url": {"url": part.pop("image")}}
    body: Any = {"model": "tiny", "messages": sent, "max_completion_tokens": 20}
    whole = server.post(body).json()
    assert whole["choices"][0]["message"]["content"] == expected
    assert whole["usage"]["prompt_tokens"] == len(chat.encode(turns)["input_ids"]), "text became control tokens"
    drawn: Any = asking("Tell me everything.", photo(3), model="noisy", max_tokens=30, temperature=1, seed=11)
    text = server.answer(drawn)
    assert text == server.answer(drawn) != server.answer(drawn | {"seed": 12}) and len(text) > 12
    assert server.answer(drawn | {"stop": [text[5:9], "~~"]}) == text[: text.index(text[5:9])]
    short = server.post(drawn | {"max_tokens": 3}).json()
    assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 3)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_what_is_refused_is_told_by_the_client(server: RunningServer) -> None:
    ask = server.client.chat.completions.create
    body: Any = asking("Hi")
    with pytest.raises(openai.NotFoundError, match="no such model"):
        ask(**body | {"model": "microsoft/Phi-3.5-vision-instruct"})
    with pytest.raises(openai.NotFoundError, match="no such model"):
        ask(**body | {"model": str(TINY)})
    with pytest.raises(openai.BadRequestError, match="1000000 of the answer are more than the 32768"):
        ask(**body | {"max_tokens": 1_000_000})
    for text in ("<|image_1|>" * 90_000, "<|end|>" * 150_000, "a" * 2_000_000, "\ufdd0" * 300_000):
        with pytest.raises(openai.BadRequestError, match=r"more than the 32768 tokens|larger"):
            ask(**asking(text))
    urls = ["http://127.0.0.1/a.png", "https://127.0.0.1/a.png", "https://example.com/a.png", "file:///etc/passwd"]
    urls += ["/etc/passwd", "data:text/html;base64,AAAA", "data:image/png;base64,", "data:image/png;base64,!!", "", "x"]
    urls += [f"https://{server.root.removeprefix('http://')}/health", "https://169.254.169.254/latest", data_url(b"hi")]
    for url in urls:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
        }
        response = server.post(body)
        assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_image", (url, response.text)
        assert "image 1" in response.text and "etc" not in response.text and "127" not in response.text
    cut = server.post(asking("Hi", photo(1), photo(2)[:-60], photo(3)))
    assert cut.status_code == 400 and "image 2: it does not decode" in cut.text, cut.text
    lost = server.post(asking("Hi", *[photo(1)] * 17))
    assert lost.status_code == 400 and "17 images" in lost.text


def test_bad_images_are_refused_and_nothing_is_started_again(server: RunningServer) -> None:
    files = [data for data, _ in odd_images().values()] + [make() for make in costly_images().values()]
    folder = Path(os.environ.get("PHI3V_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "badimages/files"
    files += [path.read_bytes() for path in sorted(folder.glob("*"))[::50]] if folder.is_dir() else []
    found = send_bad_images(server, [data for data in files if len(data) < 10_000_000], every=25)
    assert found[200] and found[400]


def test_answers_of_many_at_once_are_those_of_one_by_one(server: RunningServer) -> None:
    assert answered_as_alone(server, scenes(15, *server.names)) == []


def test_streams_that_are_dropped_leave_nothing(server: RunningServer) -> None:
    drop_streams(server, 12, clients=6)


def test_more_than_the_server_holds_is_429_and_what_is_taken_ends(server: RunningServer) -> None:
    """Twice as many as its 16 places, for two seconds; ten times for a minute in `make torture`."""
    found = overload(server, 2, 32)
    assert found["statuses"][200] and found["statuses"][429] and found["slowest look"] < 3
    for name, before in found["before"].items():
        assert found["after"][name] < before + 100_000_000, name


def test_made_up_requests_are_no_fault_with_a_model_behind_them(server: RunningServer) -> None:
    found = send_made_up(server.root, 40)
    assert sum(found.values()) >= 40 and found[400], found


def test_a_killed_worker_is_503_and_comes_back(server: RunningServer) -> None:
    statuses, seconds = kill_worker(server)
    assert statuses == [503] * 3 and seconds < 30  # 15 where the tests do not share the cores: `make torture`
    worker = server.worker()
    for beside in children(worker):  # it has nothing to do: the server must not learn of its end by a request
        os.kill(beside, signal.SIGKILL)
        server.wait_until(lambda: server.health()["status"] != "ok", 10)
        server.wait_until(lambda: server.health()["status"] == "ok", 60)
        assert server.worker() != worker


def test_a_worker_that_dies_costs_no_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a second one at once: all come out of one process that has imported everything."""
    (tmp_path / "made_up_worker.py").write_text("""
import os, sys, time
from phi3v.serve.channel import read_message, write_message
IMPORTED = time.monotonic_ns()
def main():
    read_message(sys.stdin.buffer)
    print("words of a library", file=sys.stderr)
    write_message(sys.stdout.buffer, {"is": "ready", "models": [os.getpid(), IMPORTED], "context": 9})
    read_message(sys.stdin.buffer)
""")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(phi3v.__file__).parents[1]), str(tmp_path)]))
    told: list[tuple[int, int]] = []

    async def live() -> None:
        served = backend.Backend({}, Limits())
        served._nursery = Nursery("made_up_worker")
        try:
            await served.start()
            for _ in range(3):
                told.append(tuple(served.models))
                os.kill(told[-1][0], signal.SIGKILL)
                async with asyncio.timeout(20):
                    while not (served.ready and served.models[0] != told[-1][0]):
                        await asyncio.sleep(0.01)
            last = served.models[0]
        finally:
            await served.stop()
        assert not Path(f"/proc/{last}").exists() or "Z" in Path(f"/proc/{last}/stat").read_text()

    asyncio.run(live())
    assert len({process for process, _ in told}) == 3 and len({imported for _, imported in told}) == 1


def test_sigterm_lets_answers_end_and_exits_with_0(server: RunningServer) -> None:
    text, code = stop_while_answering(server)
    assert code == 0 and len(text) > 10


def test_a_target_that_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", 2, 0.1)
    config = other / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path)}))
    for words, says in (
        ([tmp_path / "none"], "does not exist"),
        ([TINY, "--host", "0.0.0.0"], "0.0.0.0 is open to other machines"),
        ([TINY, "--max-context", "3"], "context is 3, where question and answer take 32 tokens at least"),
        ([TINY, "--batch-size", "9" * 20], "more than the limit of 1024"),
        ([TINY, "--adapter", f"a={TINY}"], "is no adapter"),
        ([TINY, "--adapter", f"a={other}"], "was tuned on"),
        ([TINY, "--api-key-file", tmp_path / "none"], "cannot be read"),
        ([TINY, "--allow-host", "a/b"], "write host or host:port"),
        ([TINY, "--allow-host", ""], "write host or host:port"),
    ):
        done = CliRunner().invoke(app, ["serve", *map(str, words), "--port", "0"])
        assert done.exit_code == 1 and done.stderr.count("\n") == 1 and says in done.stderr, done.output
