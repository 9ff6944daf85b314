"""`phi3v chat` as people use it: the command, a headless Chromium, photos, two columns, and nothing from elsewhere."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from browser import Browser
from PIL import Image
from report_content import CHROMIUM
from tiny_models import write_photos, write_tiny_model
from tiny_runs import make_recipe, make_run

from phi3v.generate import ChatModel

pytest.importorskip("gradio", reason="the page needs Gradio, which holds Pillow below 13 and is no test dependency")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
HOSTILE = "Is it <b onclick=alert(1)>red</b>?  2 < 3 ${7*7} {{7*7}} <|end|>"
READY = "!!document.querySelector('#box [data-testid=submit-button]')"
ANSWERED = (
    READY
    + """ && [...document.querySelectorAll('.answers')].every(
    one => one.querySelector('.bot') && one.querySelectorAll('.bot em').length == 0)"""
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 6)
    return make_run(folder, make_recipe(folder)).path


@pytest.fixture(scope="module")
def outside():
    """A listener that stands for the internet: whatever the server asks for through its proxies connects here."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        yield listener


@pytest.fixture(scope="module")
def server(run, outside, tmp_path_factory):
    """The address of the page, and the process and the folder for temporary files behind it."""
    place = tmp_path_factory.mktemp("temporary")
    proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
    environment |= {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": "127.0.0.1,localhost", "TMPDIR": str(place)}
    command = [sys.executable, "-m", "phi3v", "chat", str(run), "--port", "0", "--device", "cpu", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        told = json.loads(process.stdout.readline())
        assert told["columns"] == ["tuned", "base"]
        yield told["url"], process, place
        process.kill()


@pytest.fixture(scope="module")
def page(server):
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder)) as browser:
        browser.open(server[0])
        browser.wait(READY + " && !!document.querySelector('.settings button') && !!document.querySelector('#clear')")
        yield browser


def ask(page, question, *photos):
    """Puts photos and a question into the box and sends them."""
    page.settle()
    if photos:
        before = page.run("document.querySelectorAll('#views img').length")
        page.choose_files("#box input[type=file]", *photos)
        page.wait(f"document.querySelectorAll('#views img').length == {before + 3 * len(photos)}")
    page.run("document.querySelector('#box textarea').focus()")
    page.type(question)
    page.wait(f"document.querySelector('#box textarea').value == {json.dumps(question)}")
    page.settle()
    page.press_enter()


def said(page, column, who="bot"):
    """What the bubbles of a column say."""
    return page.run(f"[...document.querySelectorAll('#{column} .{who} .md')].map(one => one.textContent)")


def set_longest(page, tokens):
    """Types the longest answer into the settings, and waits until the slider beside the field has taken it."""
    field = "document.querySelector('.settings input[type=number]')"
    if not page.run(f"!!{field}?.offsetParent"):
        page.run("document.querySelector('.settings button').click()")
        page.wait(f"!!{field}?.offsetParent")
    page.run(f"{field}.focus(); {field}.select()")
    page.type(str(tokens))
    page.run(f"{field}.blur()")
    page.wait(f"document.querySelector('.settings input[type=range]').value == '{tokens}'")


def test_a_question_about_two_photos_is_answered_in_both_columns(page, run, tmp_path):
    set_longest(page, 12)
    photos = [tmp_path / "a photo & more.png", tmp_path / "tall.png"]
    for photo, size in zip(photos, ((60, 40), (30, 200)), strict=True):
        Image.new("RGB", size, (200, 40, 90)).save(photo)
    ask(page, HOSTILE, *photos)
    page.wait(ANSWERED)
    for column, base_only in (("tuned", False), ("base", True)):
        alone = ChatModel.from_target(run, device="cpu", base_only=base_only)
        assert said(page, column) == [alone.ask(photos, HOSTILE, max_new_tokens=12)]
        assert said(page, column, "user") == [HOSTILE]
        loaded = f"[...document.querySelectorAll('#{column} img')].filter(one => one.naturalWidth).length"
        page.wait(f"{loaded} == 2")
    page.wait("document.querySelector('#cost').textContent.includes('626 for 2 photos')")
    assert "of 8,192 tokens" in page.run("document.querySelector('#cost').textContent")
    assert "together 313" in page.run("document.querySelector('#views').textContent")
    shades = {}
    for dark in (False, True):
        page.look(390, 844, dark)
        page.wait(f"document.body.classList.contains('dark') == {str(dark).lower()}")
        assert page.run("document.documentElement.scrollWidth") == 390
        page.picture(tmp_path / "page.png", whole=False)
        shades[dark] = Image.open(tmp_path / "page.png").convert("L").resize((1, 1)).getpixel((0, 0))
    assert shades[True] < 90 and shades[False] > 190
    page.look(1280, 1000)


def test_a_broken_photo_is_one_line_and_the_question_stays(page, tmp_path):
    page.settle()
    page.run("document.querySelector('#clear').click()")
    page.wait("document.querySelectorAll('.answers .bot').length == 0")
    page.settle()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 nothing")
    page.choose_files("#box input[type=file]", broken)
    page.wait("document.querySelector('#cost').textContent.includes('image broken.jpg')")
    ask(page, "What is it?")
    page.settle()
    page.wait(READY)
    told = page.run("document.querySelector('.gradio-container').innerText.split('image broken.jpg').length - 1")
    assert told == 1 and page.run("document.querySelector('#notice').textContent.trim()") == ""
    assert page.run("document.querySelector('#box textarea').value") == "What is it?"
    assert said(page, "tuned") == [] and page.run(READY)
    page.run("document.querySelector('#box [aria-label^=\"Remove\"], #box .delete-button').click()")
    page.wait("!document.querySelector('#cost').textContent.includes('broken')")
    page.settle()
    page.run("document.querySelector('#box [data-testid=submit-button]').click()")
    page.wait(ANSWERED)
    assert len(said(page, "tuned")) == len(said(page, "base")) == 1
    assert page.run("document.querySelector('#notice').textContent.trim()") == ""


def test_an_answer_that_is_stopped_stays_and_the_next_is_answered(page):
    page.settle()
    page.run("document.querySelector('#clear').click()")
    page.wait("document.querySelectorAll('.answers .bot').length == 0")
    page.settle()
    set_longest(page, 4000)
    ask(page, "What is it?")
    page.wait("(document.querySelector('#tuned .bot .md')?.textContent ?? '').length > 20")
    page.run("document.querySelector('#box .stop-button').click()")
    page.wait(READY + " && document.querySelector('#base .bot em')?.textContent == 'no answer'")
    (stopped,) = said(page, "tuned")
    set_longest(page, 6)
    ask(page, "And now?")
    page.wait(READY + " && document.querySelectorAll('#base .bot').length == 2 && !document.querySelector('#tuned em')")
    page.wait("[...document.querySelectorAll('#base .bot')].at(-1).querySelector('em') === null")
    assert said(page, "tuned")[0] == stopped and said(page, "base")[0] == "no answer"


def test_a_conversation_that_is_cleared_while_it_is_answered_is_gone(page):
    set_longest(page, 4000)
    ask(page, "What is it?")
    page.wait("!!document.querySelector('#box .stop-button')")
    page.run("document.querySelector('#clear').click()")
    page.wait(READY + " && document.querySelectorAll('.answers .message').length == 0")
    set_longest(page, 3)
    ask(page, "What is it?")
    page.wait(ANSWERED)
    assert len(said(page, "tuned")) == len(said(page, "base")) == 1


def test_nothing_came_from_elsewhere_and_the_console_is_silent(page, server, outside):
    address = server[0]
    elsewhere = [one for one in page.requests if not one.startswith((address, "data:", "blob:" + address))]
    assert len(page.requests) > 50 and elsewhere == [] and page.told == []
    with pytest.raises(TimeoutError):
        outside.accept()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)


def test_it_ends_with_the_uploads_gone(page, server):
    _, process, place = server
    assert len(list(place.glob("phi3v-chat-*/*"))) >= 3
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0 and list(place.glob("phi3v-chat-*")) == []
