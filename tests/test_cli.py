"""The command line from outside: exit codes, errors of one line, one JSON object for machines, a quick --help."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
import transformers
import typer
from tiny_models import write_photos, write_tiny_model
from typer.testing import CliRunner

from phi3v import cli_session
from phi3v.cli import app
from phi3v.data.quiet_tiff import silence_libtiff
from phi3v.evaluation.figures import short_number
from phi3v.generate import ask

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
RECIPE = """
model: {folder}/model
data:
  train: {folder}/photos/rows.jsonl
  prompt: What colour?
  answer: It is {{colour}}.
  split:
    validation: 6
training:
  samples_per_step: 2
  micro_batch_size: 2
  max_steps: 2
evaluation:
  max_new_tokens: 4
report:
  samples: 2
output: {folder}/run
"""

SEVERAL = """
import json, sys
from phi3v.cli import app
for words in json.loads(sys.argv[1]):
    try: app(words)
    except SystemExit as done: print(done.code, flush=True)
"""


def phi3v(*words: object, timeout: float = 120, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run `python -m phi3v` and give back exit code and both streams."""
    command = [sys.executable, "-m", "phi3v", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, photos and a recipe."""
    place = tmp_path_factory.mktemp("cli")
    write_tiny_model(place / "model")
    write_photos(place / "photos", 24)
    (place / "recipe.yaml").write_text(RECIPE.format(folder=place))
    return place


@pytest.fixture(scope="module")
def trained(folder):
    """What `phi3v train` printed; the run is in folder/run."""
    return phi3v("train", folder / "recipe.yaml")


@pytest.fixture
def inside(monkeypatch):
    """Runs a command in this process, without hushing the libraries of the other tests."""
    monkeypatch.setattr(cli_session, "hush", lambda debug, as_json: None)
    transformers.utils.logging.disable_progress_bar()
    runner = CliRunner()
    return lambda *words: runner.invoke(app, list(map(str, words)))


def test_commands_and_flags_are_frozen():
    """A new flag needs a reason: nearly everything belongs into a recipe."""
    root = typer.main.get_command(app)
    commands = {**root.commands, **{f"data {name}": one for name, one in root.commands["data"].commands.items()}}
    found = {name: [option for p in command.params for option in p.opts] for name, command in commands.items()}
    assert [option for p in root.params for option in p.opts] == ["--version", "--debug"]
    assert found == {
        "train": ["recipe", "overrides", "--json", "--debug"],
        "evaluate": [
            "target",
            "--data",
            "--against",
            "--metrics",
            "--checks",
            "--rows",
            "--device",
            "--json",
            "--debug",
        ],
        "predict": [
            *["target", "--data", "--out", "--prompt", "--rows", "--batch-size", "--max-new-tokens", "--device"],
            *["--json", "--debug"],
        ],
        "compare": ["runs", "--out", "--json", "--debug"],
        "ask": ["target", "images_and_question", "--device", "--json", "--debug"],
        "plan": ["recipe", "overrides", "--memory", "--rows", "--image", "--json", "--debug"],
        "doctor": ["recipe", "overrides", "--json", "--debug"],
        "profile": ["recipe", "overrides", "--steps", "--rows", "--image", "--trace", "--json", "--debug"],
        "demo": ["--output", "--json", "--debug"],
        "data": [],
        "data check": ["source", "overrides", "--fetch", "--shard", "--quick", "--json", "--debug"],
        "data show": ["source", "overrides", "--rows", "--out", "--text", "--quick", "--json", "--debug"],
    }


def test_help_imports_nothing_heavy():
    lines = [["--help"], ["--version"], ["train", "--help"], ["demo", "-h"], ["data", "check", "-h"]]
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules)"
    program = f"{SEVERAL}print('imported', {heavy})"
    done = subprocess.run([sys.executable, "-c", program, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed.count("0") == len(lines) and printed[-1] == "imported set()"


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        *((name, "RECIPE [key=value ...] [OPTIONS]") for name in ("train", "profile", "doctor", "plan")),
        ("evaluate", "TARGET [OPTIONS]"),
        ("predict", "TARGET [OPTIONS]"),
        ("compare", "RUN RUN ... [OPTIONS]"),
        ("ask", 'TARGET IMAGE... "question" [OPTIONS]'),
        ("demo", "[OPTIONS]"),
        ("data check", "RECIPE|DATASET [key=value ...] [OPTIONS]"),
        ("data show", "RECIPE|DATASET [key=value ...] [OPTIONS]"),
    ],
)
def test_usage_is_what_is_typed(inside, command, usage):
    done = inside(*command.split(), "--help")
    assert re.match(rf"Usage: \S+ {command} {re.escape(usage)}\n", done.stdout), done.stdout
    arguments = done.stdout.partition("Arguments:")[2].partition("Options:")[0]
    assert not set("<>{}") & set(arguments) and "--json" in done.stdout


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


def test_version(inside):
    assert re.fullmatch(r"phi3v \d+\.\d+\.\d+\S*\n", inside("--version").output)


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["train"],
        ["train", "recipe.yaml", "not an override"],
        ["train", "recipe.yaml", "--no-such-flag"],
        ["evaluate", "run", "--rows", "0"],
        ["evaluate", "run", "--rows", "many"],
        ["ask", "run"],
        ["ask", "run", __file__, " "],
        ["ask", "run", __file__],  # a file where the question belongs
    ],
)
def test_wrong_usage_exits_with_2(inside, words):
    done = inside(*words)
    assert done.exit_code == 2, done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "{folder}/recipe.yaml", "training.learning_rat=1"], "learning_rate"),
        (["train", "{folder}/recipe.yaml", "training.warmup_step=1", "output={folder}/new1"], "warmup_steps"),
        (["train", "{folder}/recipe.yaml", "data.answer={no_column}", "output={folder}/new2"], "no_column"),
        (["train", "{folder}/recipe.yaml", "model.name={folder}/nothing", "output={folder}/new3"], "nothing"),
        (["evaluate", "{folder}/nothing"], "nothing does not exist (looked in "),
        (["evaluate", "runs/nope"], "runs/nope does not exist (looked in "),
        (["evaluate", "{folder}/model"], "--data"),
        (["ask", "{folder}/nothing", "What is it?"], "nothing"),
        (["ask", "{folder}/model", "{folder}/none.png", "What is it?"], "none.png"),
        (["ask", "{folder}/model", "{folder}/recipe.yaml", "What is it?"], "recipe.yaml"),
    ],
)
def test_what_is_wrong_is_one_line(inside, folder, words, says):
    done = inside(*[word.replace("{folder}", str(folder)) for word in words])
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("phi3v: ")
    assert says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--debug", "train", "nowhere.yaml"], ["train", "nowhere.yaml", "--debug"]])
def test_debug_shows_the_traceback(inside, words):
    done = inside(*words)
    assert done.exit_code == 1
    assert "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("phi3v: ")


def test_a_fault_nobody_foresaw_is_one_line_too(inside, monkeypatch):
    def fail(path, overrides):
        raise RuntimeError("something\nunforeseen")

    monkeypatch.setattr("phi3v.recipe.Recipe.load", fail)
    done = inside("train", "recipe.yaml")
    assert done.exit_code == 1
    assert done.stderr == "phi3v: RuntimeError: something unforeseen (run again with --debug to see where)\n"


def test_an_interrupt_is_one_line_and_130(inside, monkeypatch):
    def interrupt(path, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr("phi3v.recipe.Recipe.load", interrupt)
    done = inside("train", "recipe.yaml")
    assert (done.exit_code, done.stderr) == (130, "phi3v: interrupted; the same command again goes on with the run\n")


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_stops_a_training(folder):
    output = folder / "interrupted"
    words = [
        "train",
        folder / "recipe.yaml",
        "training.max_steps=100000",
        "training.logging_steps=1",
        f"output={output}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "phi3v", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background inherits an ignored SIGINT, and would hand it on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    waited = time.monotonic() + 90
    while not (output / "metrics.jsonl").is_file() and time.monotonic() < waited and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "phi3v: interrupted; the same command again goes on with the run"
    assert "Traceback" not in errors


def test_train_shows_what_trains_and_writes_a_whole_run(trained, folder):
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    for words in ("what trains", "language model", "vision tower", "held-out rows", "exact match", "report.html"):
        assert words in trained.stdout
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line["loss"] for line in lines if "loss" in line][-1]
    assert f"training: 2 of 2, loss {short_number(last)}" in trained.stdout
    names = "recipe.yaml versions.json metrics.jsonl adapter predictions.jsonl evaluation.json report.html".split()
    assert not [name for name in names if not (folder / "run" / name).exists()]


def test_a_run_of_relative_paths_works_from_any_folder(inside, folder, tmp_path, monkeypatch):
    recipe = (folder / "recipe.yaml").read_text().replace(f"{folder}/", "")
    (folder / "relative.yaml").write_text(recipe)
    monkeypatch.chdir(folder)
    done = inside("train", "relative.yaml", "output=relative", "evaluation.rows=2")
    assert done.exit_code == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    elsewhere = inside("evaluate", folder / "relative", "--json")
    assert elsewhere.exit_code == 0, elsewhere.stderr
    assert json.loads(elsewhere.stdout)["base"] == str(folder / "model")
    again = inside("train", folder / "relative" / "recipe.yaml", "--json")
    assert json.loads(again.stdout)["status"] == "finished", again.stderr
    assert list(tmp_path.iterdir()) == []


def test_train_again_says_that_it_is_finished(trained, inside, folder):
    again = inside("train", folder / "recipe.yaml", "--json")
    assert again.exit_code == 0, again.stderr
    result = json.loads(again.stdout)
    assert (result["status"], result["steps"]) == ("finished", 2)
    assert result["evaluation"]["rows"] == 6 and result["report"] == str(folder / "run" / "report.html")


def test_json_of_a_training_is_alone_on_standard_output(inside, folder):
    done = inside("train", folder / "recipe.yaml", f"output={folder / 'other'}", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert result["status"] == "trained" and result["trainable"]["language model"]["trainable"] > 0
    assert "what trains" in done.stderr


def test_evaluate(trained, inside, folder):
    run = folder / "run"
    assert "same answer to all" in inside("evaluate", run).stdout
    done = inside("evaluate", run, "--rows", 2, "--data", folder / "recipe.yaml", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"] == 2 and result["base"] == str(folder / "model")
    assert set(result["scores"]) == {"base", "tuned"}


def test_ask_streams_and_answers_the_same_for_machines(trained, inside, folder):
    photos = [folder / "photos" / "0.png", folder / "photos" / "1.png"]
    streamed = inside("ask", folder / "run", *photos, "Which colours?")
    done = phi3v("ask", folder / "run", *photos, "Which colours?", "--json")
    assert (streamed.exit_code, done.returncode) == (0, 0), streamed.stderr + done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert streamed.stdout == result["answer"] + "\n" and result["answer"]
    assert result["images"] == list(map(str, photos)) and result["question"] == "Which colours?"
    assert streamed.stderr == "" and done.stderr == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_run_that_was_trained_on_a_gpu_is_asked_and_evaluated_on_a_cpu(trained, folder, inside, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    assert recipe.count("device: auto") == 1
    (run / "recipe.yaml").write_text(recipe.replace("device: auto", "device: cuda"))
    question = ["ask", run, folder / "photos" / "0.png", "What colour?"]
    evaluation = ["evaluate", run, "--rows", 1]
    for words in (question, evaluation):
        refused, done = inside(*words), inside(*words, "--device", "cpu", "--json")
        assert refused.exit_code == 1 and "sees no GPU" in refused.stderr and "--device cpu" in refused.stderr
        assert done.exit_code == 0, done.output
    assert json.loads(inside(*question, "--device", "cpu", "--json").stdout)["answer"] == ask(
        run, folder / "photos" / "0.png", "What colour?", device="cpu"
    )
    wrong = inside(*evaluation, "--device", "gpu")
    assert wrong.exit_code == 1 and "'gpu' names no device" in wrong.stderr


def test_libraries_say_nothing_beside_our_line(folder):
    (folder / "photos" / "broken.jsonl").write_text('{"image": "0.png", "colour": "red"}\n{"image":\n')
    (folder / "photos" / "broken.csv").write_bytes(b"image,colour\n0.png,\xff\n")
    names = ("broken.jsonl", "broken.csv")
    lines = [
        ["train", f"{folder}/recipe.yaml", f"data.train={folder}/photos/{name}", f"output={folder}/broken_run"]
        for name in names
    ]
    done = subprocess.run([sys.executable, "-c", SEVERAL, json.dumps(lines)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n1\n"), done.stderr
    for name, line in zip(names, done.stderr.splitlines(), strict=True):
        assert line.startswith("phi3v: ") and f"{name} cannot be read: line 2 is not" in line


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


def test_a_reader_that_goes_away_is_no_traceback(trained, folder):
    command = f'"{sys.executable}" -m phi3v ask "{folder}/run" "{folder}/photos/0.png" "What colour?" | true'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
