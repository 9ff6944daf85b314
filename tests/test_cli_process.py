"""The command line in a process of its own: what it imports, what reaches the terminal, Ctrl-C, a quick --help."""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import write_tiny_recipe

from phi3v.data.quiet_tiff import silence_libtiff
from phi3v.evaluation.figures import short_number

BARE = """
import typer
app = typer.Typer()
@app.callback()
def root(): "A program."
@app.command()
def one(name: str): "One command."
@app.command()
def two(name: str): "Another."
app()
"""
SEVERAL = """
import json, sys
from phi3v.cli import app
for words in json.loads(sys.argv[1]):
    try: app(words)
    except SystemExit as done: print(done.code, flush=True)
"""
TERMINAL = """
import json, os, sys
from phi3v.cli import app
told = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    words, *places = json.loads(line)
    for number, place in enumerate(places, start=1):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try: app(words)
    except SystemExit as done: print(done.code, file=told, flush=True)
"""


class Terminal:
    """A process of its own that runs one command after another, as one that is started for each would, in less time.

    Both its streams are files, from the system's view too, so what a library writes past Python is seen as well.
    """

    def __init__(self, folder: Path):
        self.places = [str(folder / name) for name in ("standard-output", "standard-error")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # a test run in the background inherits an ignored SIGINT, and would hand it on
            preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None,
        )

    def begin(self, *words: object) -> None:
        """Types a command."""
        self.process.stdin.write(json.dumps([[*map(str, words)], *self.places]) + "\n")
        self.process.stdin.flush()

    def end(self) -> subprocess.CompletedProcess[str]:
        """Waits for it: exit code and both streams."""
        code = int(self.process.stdout.readline())
        return subprocess.CompletedProcess([], code, *(Path(place).read_text() for place in self.places))

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Both."""
        self.begin(*words)
        return self.end()


@pytest.fixture(scope="module")
def terminal(tmp_path_factory):
    """The process that every test of the file types into that needs one."""
    place = Terminal(tmp_path_factory.mktemp("terminal"))
    yield place
    place.process.stdin.close()
    assert place.process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_recipe(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def trained(folder, terminal):
    """What `phi3v train` printed; the run is in folder/run."""
    return terminal.run("train", folder / "recipe.yaml", "data.revision=main")


def test_help_and_what_is_wrong_as_typed_import_nothing_heavy():
    """Nobody waits for torch to read that a recipe has a slip or that a file is not there."""
    asked = [["--help"], ["--version"], ["train", "--help"], ["demo", "-h"], ["data", "check", "-h"]]
    recipes = ["train", "plan", "doctor", "profile", "data check", "data show"]
    slips = [[*command.split(), "nowhere.yaml"] for command in recipes]
    slips += [["ask", "./nowhere", "Who?"], ["evaluate", "./nowhere"]]
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules)"
    program = f"import sys\ndef told(): print('imported', {heavy}, flush=True)\n"
    for lines in (asked, slips):
        program += SEVERAL.replace("json.loads(sys.argv[1])", repr(lines)) + "told()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed.count("0") == len(asked) and printed.count("1") == len(slips) == done.stderr.count("nowhere")
    assert [line for line in printed if line.startswith("imported")] == ["imported set()", "imported {'PIL'}"]


def test_help_takes_at_most_twice_a_bare_program(tmp_path):
    bare = tmp_path / "bare.py"
    bare.write_text(BARE)
    times: dict[str, list[float]] = {"bare": [], "phi3v": []}
    commands = {"bare": [sys.executable, str(bare)], "phi3v": [sys.executable, "-m", "phi3v"]}
    for _ in range(7):  # alternating, so that a busy machine slows both
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run([*command, "--help"], capture_output=True, check=True)
            times[name].append(time.perf_counter() - began)
    ratio = statistics.median(times["phi3v"]) / statistics.median(times["bare"])
    assert ratio <= 2.0, f"phi3v --help takes {ratio:.2f} times a bare typer program"


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_stops_a_training(folder, terminal):
    output = folder / "interrupted"
    endless = ["training.max_steps=100000", "training.logging_steps=1", f"output={output}"]
    terminal.begin("train", folder / "recipe.yaml", *endless)
    waited = time.monotonic() + 90
    while not (output / "metrics.jsonl").is_file() and time.monotonic() < waited and terminal.process.poll() is None:
        time.sleep(0.1)
    terminal.process.send_signal(signal.SIGINT)
    done = terminal.end()
    assert done.returncode == 130, done.stderr
    assert done.stderr == "phi3v: interrupted; the same command again goes on with the run\n"


def test_train_shows_what_trains_and_writes_a_whole_run(trained, folder):
    assert trained.returncode == 0, trained.stderr
    # a warning is on the screen, once, though the libraries are hushed: rows are opened again for the answers
    ignored = f"data.revision main is ignored: {folder / 'photos' / 'rows.jsonl'} is a local file or folder"
    assert trained.stderr == f"phi3v: {ignored}\n"
    for words in ("what trains", "language model", "vision tower", "held-out rows", "exact match", "report.html"):
        assert words in trained.stdout
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line["loss"] for line in lines if "loss" in line][-1]
    assert f"training: 2 of 2, loss {short_number(last)}" in trained.stdout
    names = "recipe.yaml versions.json metrics.jsonl adapter predictions.jsonl evaluation.json report.html".split()
    assert not [name for name in names if not (folder / "run" / name).exists()]
    assert (folder / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert 'aria-label="loss over the optimiser steps"' in (folder / "run" / "report.html").read_text()


def test_ask_is_silent_beside_its_answer(trained, terminal, folder):
    done = terminal.run("ask", folder / "run", folder / "photos" / "0.png", "Which colour?", "--json")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert json.loads(done.stdout)["answer"]


def test_libraries_say_nothing_beside_our_line(folder, terminal):
    (folder / "photos" / "broken.jsonl").write_text('{"image": "0.png", "colour": "red"}\n{"image":\n')
    (folder / "photos" / "broken.csv").write_bytes(b"image,colour\n0.png,\xff\n")
    for name in ("broken.jsonl", "broken.csv"):
        broken = [f"data.train={folder}/photos/{name}", f"output={folder}/broken_run"]
        done = terminal.run("train", folder / "recipe.yaml", *broken)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("phi3v: ")
        assert f"{name} cannot be read: line 2 is not" in done.stderr


DAMAGED_TIFF = """
import io, sys
from PIL import Image
from phi3v.cli_session import session
from phi3v.data.images import open_image
from phi3v.errors import ImageError

buffer = io.BytesIO()
Image.linear_gradient("L").save(buffer, "TIFF", compression="tiff_adobe_deflate")
data, strip = bytearray(buffer.getvalue()), Image.open(buffer).tag_v2[273][0]
data[strip + 2 : strip + 102] = b"\\xff" * 100
with session(debug=sys.argv[1] == "debug"):
    try:
        open_image(bytes(data))
        print("opened")
    except ImageError as error:
        print(error)
"""


def test_what_libtiff_writes_past_python_does_not_reach_the_terminal():
    def run(mode):
        return subprocess.run([sys.executable, "-c", DAMAGED_TIFF, mode], capture_output=True, text=True, check=True)

    if not silence_libtiff():
        pytest.skip("PIL's libtiff does not show its switches here")
    loud, quiet = run("debug"), run("quiet")
    assert loud.stdout == quiet.stdout and "embedded image does not decode" in quiet.stdout
    assert "ZIPDecode" in loud.stderr and quiet.stderr == ""


def test_a_reader_that_goes_away_is_no_traceback(folder):
    """And a set that is looked at without a model is looked at without transformers: seconds less."""
    words = ["data", "check", f"{folder}/photos/rows.jsonl", "data.prompt=What?", "data.answer='{colour}'", "--json"]
    program = f"{SEVERAL}print({{'datasets', 'transformers'}} & set(sys.modules), file=sys.stderr)"
    command = [sys.executable, "-c", program, json.dumps([words])]
    done = subprocess.run(["sh", "-c", f"{shlex.join(command)} | true"], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
    assert done.stderr.splitlines()[-1] == "{'datasets'}"
