"""The page of `phi3v chat` without a browser: what it shows, what it refuses, and what the server lets through."""

import json
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from starlette.testclient import TestClient
from tiny_models import write_photos, write_tiny_model
from typer.testing import CliRunner

from phi3v import cli_session
from phi3v.cli import app
from phi3v.errors import ConfigError
from phi3v.generate import ChatModel
from phi3v.serve.page_guard import MAX_BODY, MOST_TRIES
from phi3v.serve.side_by_side import TUNED, SideBySide, Turn

pytest.importorskip("gradio", reason="the page needs Gradio, which holds Pillow below 13 and is no test dependency")
from phi3v.serve.chat import QUESTION, example_question, serve_chat
from phi3v.serve.run import is_loopback
from phi3v.serve.ui import ChatPage, chat_app

ME = SimpleNamespace(session_hash="me")
HOSTS = {"127.0.0.1", "localhost"}
HOSTILE = "<img src=x onerror=alert(1)> &amp; ${7*7} {{7*7}}"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where uploads of the page lie."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def page(target, folder):
    with pytest.MonkeyPatch.context() as here:
        here.setenv("GRADIO_TEMP_DIR", str(folder))
        yield ChatPage(SideBySide(ChatModel.from_target(target, device="cpu")), folder, {TUNED: HOSTILE}, "What is it?")


@pytest.fixture(scope="module")
def client(page):
    with TestClient(chat_app(page, HOSTS), base_url="http://127.0.0.1:7860") as client:
        yield client


def box(question="", *files):
    return {"text": question, "files": [str(file) for file in files]}


def plain(html):
    """The text of a piece of HTML, which must hold no element that nobody put there."""
    reader = HTMLParser()
    found, tags = [], set()
    reader.handle_data = found.append
    reader.handle_starttag = lambda tag, attributes: tags.add(tag)
    reader.feed(html)
    reader.close()
    assert tags <= {"div", "p", "h1", "em", "meter"}, tags
    return "".join(found)


def test_what_was_wrong_stays_in_the_box_with_one_line(page, folder):
    broken = folder / "<b>broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 nothing")
    turns = (Turn("Before?", (), {TUNED: "It was."}),)
    asked = box("What is it?", broken)
    ((back, kept, notice, *chats),) = page.send(asked, turns, 20, 0, ME)
    assert back["value"] == asked and back["submit_btn"] is True and kept == turns
    assert [message["content"][0]["text"] for message in chats[0]] == ["Before?", "It was."]
    cost, views, _ = page.look(asked, turns, ())
    assert notice == "" and "value" not in views  # one line, below the box, which is there before anything is sent
    assert plain(cost).startswith("image <b>broken.jpg ") and "\n" not in plain(cost) and str(folder) not in cost
    ((back, kept, notice, *_),) = page.send(box("What is it?"), turns, 8192, 0, ME)
    assert back["value"] == box("What is it?") and "the model's context is 8,192" in plain(notice) and kept == turns


def test_a_file_that_was_not_uploaded_is_not_read(page, target):
    asked = box("What?", target / "config.json")
    ((back, _, notice, *_),) = page.send(asked, (), 20, 0, ME)
    assert back["value"] == asked and notice == ""
    assert plain(page.look(asked, (), ())[0]) == "image config.json was not uploaded: drop it into the page"


def test_an_answer_grows_and_the_box_says_whether_it_can_be_stopped(page, folder):
    photo = folder / "red.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    seen = list(page.send(box(HOSTILE, photo), (), 20, 0, ME))
    assert (seen[0][0]["stop_btn"], seen[0][0]["value"]) == (True, box()) and seen[-1][0]["stop_btn"] is False
    turn = seen[-1][1][-1]
    (question, answer) = seen[-1][3]
    shown, text = question["content"]
    assert plain(text["text"]) == HOSTILE and plain(answer["content"][0]["text"]) == turn.answers[TUNED] != ""
    assert Path(shown["path"]).parent == folder and Image.open(shown["path"]).format == "JPEG"
    cost, views, looked_at = page.look(box(), seen[-1][1], ())
    assert "of 8,192 tokens, 313 for 1 photo" in plain(cost) and views.count("<img") == 3
    assert "value" not in page.look(box("more"), seen[-1][1], looked_at)[1]  # the same photos are not sent again
    assert page.clear(ME)[1:] == ((), "", []) and page.fill(box("", photo)) == box("What is it?", photo)


def test_what_was_stopped_or_cleared_is_what_is_shown_last(page, monkeypatch):
    monkeypatch.setattr("phi3v.serve.ui._PAUSE", 0)  # every piece is shown, however fast the answer is over
    before = (Turn("Before?", (), {TUNED: "It was."}),)
    growing = page.send(box("What is it?"), before, 4000, 0, ME)
    while not (half := next(growing)[1][-1].answers[TUNED]):
        pass
    page.stop(SimpleNamespace(session_hash="another"))
    page.stop(ME)
    ((back, kept, _, chat),) = list(growing)
    assert (back["stop_btn"], kept[-1].answering) == (False, None) and kept[-1].answers[TUNED].startswith(half)
    assert len(kept[-1].answers[TUNED]) < 4000 and len(chat) == 4
    growing = page.send(box("What is it?"), before, 4000, 0, ME)
    next(growing)
    page.clear(ME)
    ((back, kept, _, chat),) = list(growing)
    assert (back["stop_btn"], kept, chat) == (False, (), [])
    page.stop(ME)  # nothing is being answered: the next question is
    assert list(page.send(box("What is it?"), (), 3, 0, ME))[-1][1][-1].answers[TUNED]


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert (
        answer.status_code == 200
        and "onerror=alert(1)>" not in answer.text.replace("\\u003e", ">").split("<script>")[0]
    )
    assert "connect-src" not in answer.headers["content-security-policy"]  # as default-src says
    assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False and config["stylesheets"] == []
    assert all(one["api_visibility"] == "private" for one in config["dependencies"])


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"host": "evil.example:7860"}, 403),
        ("/", {"host": ""}, 403),
        ("/config", {"origin": "http://evil.example"}, 403),
        ("/config", {"origin": "null"}, 403),
        ("/config", {"origin": "http://127.0.0.1:7860"}, 200),
        ("/", {"content-length": str(MAX_BODY + 1)}, 413),
        ("/", {"content-length": "-1"}, 413),
        ("/gradio_api/file=/etc/passwd", {}, 403),
        ("/gradio_api/file={model}/config.json", {}, 403),
        ("/gradio_api/file=http://127.0.0.1:1/", {}, 404),
        ("/gradio_api/proxy=http://127.0.0.1:1/", {}, 404),
        ("/gradio_api/openapi.json", {}, 404),
        ("/gradio_api/runs", {}, 404),
        ("/gradio_api/run/send", {}, 404),
        ("/gradio_api/call/send", {}, 404),
        ("/gradio_api/process_recording", {}, 404),
        ("/monitoring", {}, 404),
        ("/docs", {}, 404),
    ],
)
def test_what_the_server_lets_through(client, target, path, headers, status):
    assert client.get(path.replace("{model}", str(target)), headers=headers).status_code == status


def test_a_path_that_a_request_names_is_not_copied(client, folder, target):
    secret = target / "config.json"
    named = {"path": str(secret), "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    config = client.get("/config").json()
    number = next(one["id"] for one in config["dependencies"] if len(one["inputs"]) == 3)
    session = "abcdef"
    body = {"data": [{"text": "", "files": [named]}, None, None], "fn_index": number, "session_hash": session}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
        for line in events.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                break
    assert message["success"] is False
    assert secret.read_bytes() not in [file.read_bytes() for file in folder.rglob("*") if file.is_file()]


def test_a_password_is_asked_for(page):
    with TestClient(chat_app(page, None, "pass wörd"), base_url="http://chat.example") as client:
        assert client.get("/config").status_code == 401
        assert client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0}).status_code == 401
        wrong = client.post("/login", data={"username": "me", "password": "pass word"})
        assert wrong.status_code == 400
        assert client.post("/login", data={"username": "me", "password": "pass wörd"}).status_code == 200
        assert client.get("/config").status_code == 200
        tried = [client.post("/login", data={"username": "me", "password": str(one)}) for one in range(MOST_TRIES + 1)]
        assert [one.status_code for one in tried] == [400] * MOST_TRIES + [429] and "wait a minute" in tried[-1].text
        right = {"username": "me", "password": "pass wörd"}
        assert client.post("/login/", data=right).status_code == 429 and client.get("/config").status_code == 200


def test_where_the_page_may_be(target):
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.2", "example.org")] == [False] * 4
    for password in (None, "", "p" * 15):
        with pytest.raises(
            ConfigError, match="lets other machines in: set PHI3V_CHAT_PASSWORD to a password of 16 char"
        ):
            serve_chat(target, host="0.0.0.0", password=password, on_ready=print)
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(ConfigError, match=r"cannot listen at 127\.0\.0\.1, port \d+ \(Address already in use\)"):
        serve_chat(target, port=taken.getsockname()[1], on_ready=print)


def test_the_question_to_begin_with_is_the_run_s(target, tmp_path):
    from tiny_runs import make_recipe

    from phi3v.run_folder import RunFolder

    write_photos(tmp_path / "photos", 1)
    assert example_question(target) == QUESTION
    for prompt, question in (("Which {{colour}}?", "Which {colour}?"), ("Is it {colour}?", QUESTION)):
        data = {"train": str(tmp_path / "photos" / "rows.jsonl"), "prompt": prompt, "answer": "It is {colour}."}
        recipe = make_recipe(tmp_path / question[:8], data=data)
        RunFolder(recipe.output).start(recipe)
        assert example_question(recipe.output) == question


def test_without_gradio_it_is_one_line(target, monkeypatch):
    monkeypatch.setattr(cli_session, "hush", lambda debug, as_json: None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["chat", str(target)])
    line = 'phi3v: phi3v chat needs gradio, which is not installed: pip install "phi3v[chat]"\n'
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", line)
