"""The command line as it is typed: exit codes, errors of one line, one JSON object for machines.

What needs a process of its own is in test_cli_process.py.
"""

import io
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
import typer
from rich.console import Console
from tiny_models import write_tiny_recipe
from typer.testing import CliRunner

from phi3v import cli_session
from phi3v.cli import app
from phi3v.cli_screen import Screen
from phi3v.generate import ask
from phi3v.training.callbacks import ProgressCallback, TrainingEvent
from phi3v.training.meter import Meter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_recipe(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def inside():
    """Runs a command in this process, without hushing the libraries of the other tests."""
    transformers.utils.logging.disable_progress_bar()
    runner = CliRunner()
    with pytest.MonkeyPatch.context() as here:
        here.setattr(cli_session, "hush", lambda debug, as_json: None)
        yield lambda *words: runner.invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def trained(folder, inside):
    """What `phi3v train --json` printed; the run is in folder/run."""
    return inside("train", folder / "recipe.yaml", "--json")


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
            "overrides",
            "--data",
            "--against",
            "--metrics",
            "--checks",
            "--rows",
            "--out",
            "--device",
            "--json",
            "--debug",
        ],
        "predict": [
            *["target", "--data", "--out", "--prompt", "--rows", "--batch-size", "--max-new-tokens"],
            *["--max-pixels", "--device", "--json", "--debug", "overrides"],
        ],
        "sweep": ["recipe", "overrides", "--json", "--debug"],
        "compare": ["runs", "--out", "--json", "--debug"],
        "export": [
            *["target", "--to", "--out", "--dtype", "--shard-size", "--precision", "--base", "--push", "--public"],
            *["--json", "--debug"],
        ],
        "ask": ["target", "images_and_question", "--runtime", "--max-pixels", "--device", "--json", "--debug"],
        "chat": ["target", "--host", "--port", "--device", "--json", "--debug"],
        "serve": [
            *["target", "--adapter", "--host", "--port", "--api-key-file", "--allow-host", "--batch-size", "--queue"],
            *["--timeout", "--max-context", "--device", "--json", "--debug"],
        ],
        "plan": ["recipe", "overrides", "--memory", "--rows", "--image", "--json", "--debug"],
        "doctor": ["recipe", "overrides", "--json", "--debug"],
        "profile": ["recipe", "overrides", "--steps", "--rows", "--image", "--words", "--trace", "--json", "--debug"],
        "demo": ["--output", "--json", "--debug"],
        "data": [],
        "data check": ["source", "overrides", "--fetch", "--shard", "--quick", "--json", "--debug"],
        "data show": ["source", "overrides", "--rows", "--out", "--text", "--quick", "--json", "--debug"],
    }


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        *((name, "RECIPE [key=value ...] [OPTIONS]") for name in ("train", "sweep", "profile", "doctor", "plan")),
        ("evaluate", "TARGET [key=value ...] [OPTIONS]"),
        ("predict", "TARGET [key=value ...] [OPTIONS]"),
        ("compare", "RUN RUN ... [OPTIONS]"),
        ("export", "TARGET [OPTIONS]"),
        ("ask", 'TARGET IMAGE... "question" [OPTIONS]'),
        ("chat", "TARGET [OPTIONS]"),
        ("serve", "TARGET [OPTIONS]"),
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
        ["ask", "run", __file__, __file__],
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


def test_json_of_a_training_is_alone_on_standard_output(trained):
    assert trained.exit_code == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert trained.stdout.count("\n") == 1
    assert result["status"] == "trained" and result["trainable"]["language model"]["trainable"] > 0
    assert "what trains" in trained.stderr


def test_train_again_says_that_it_is_finished(trained, inside, folder):
    again = inside("train", folder / "recipe.yaml", "--json")
    assert again.exit_code == 0, again.stderr
    result = json.loads(again.stdout)
    assert (result["status"], result["steps"]) == ("finished", 2)
    assert result["evaluation"]["rows"] == 6 and result["report"] == str(folder / "run" / "report.html")


def test_evaluate(trained, inside, folder):
    run = folder / "run"
    shown = inside("evaluate", run).stdout
    assert "best single answer" in shown and "check images: " in shown
    done = inside("evaluate", run, "--rows", 2, "--data", folder / "recipe.yaml", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"] == 2 and result["base"] == str(folder / "model")
    assert set(result["scores"]) == {"base", "tuned"}


def test_ask_streams_and_answers_the_same_for_machines(trained, inside, folder):
    photos = [folder / "photos" / "0.png", folder / "photos" / "1.png"]
    streamed, done = (inside("ask", folder / "run", *photos, "Which colours?", *how) for how in ((), ("--json",)))
    assert (streamed.exit_code, done.exit_code) == (0, 0), streamed.stderr + done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert streamed.stdout == result["answer"] + "\n" and result["answer"]
    assert result["images"] == list(map(str, photos)) and result["question"] == "Which colours?"
    assert streamed.stderr == ""


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


@pytest.mark.parametrize(("width", "note"), [(80, "loss 5.85, 1…"), (130, "loss 5.85, 11.9 samples/s, 4,040 tokens/s")])
def test_a_narrow_terminal_cuts_the_note_and_neither_bar_nor_count_nor_time_left(width, note):
    console = Console(width=width, file=(shown := io.StringIO()), force_terminal=True)
    rates = {"samples_per_second": 11.9, "tokens_per_second": 4040.0}
    with Screen(console) as screen:
        screen.on_progress("looking at the held-out rows", 2, 2)
        screen.on_event(TrainingEvent("metrics", 7, 400, metrics={"loss": 5.85}))
        screen.on_event(TrainingEvent("step", 7, 400, rates=rates))
    last = [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue()).splitlines() if "training" in line]
    assert re.fullmatch(rf"training +━{{16}} +7/400 left -:--:-- {note} *", last[-1]), last[-1]


def test_without_a_terminal_lines_say_the_time_left():
    console = Console(file=(shown := io.StringIO()))
    with Screen(console) as screen:
        screen.on_event(TrainingEvent("start", 0, 40))
        for step in (4, 40):
            screen.on_event(TrainingEvent("metrics", step, 40, metrics={"loss": 5.85}))
            screen.on_event(TrainingEvent("step", step, 40))
    first, last = shown.getvalue().splitlines()
    assert re.fullmatch(r"training: 4 of 40, [\d.]+ s left, loss 5.85", first)
    assert last == "training: 40 of 40, loss 5.85"
    with Screen(console) as screen:
        meter, at = Meter(), SimpleNamespace(global_step=0, max_steps=2)
        progress = ProgressCallback(screen.on_event, None, meter)
        progress.on_train_begin(None, at, None)
        for at.global_step in (1, 2):
            meter.left_out += 1
            progress.on_step_end(None, at, SimpleNamespace(should_log=True))
            progress.on_log(None, at, None, {})
    assert shown.getvalue().endswith(", 2 steps left out\n"), "the last step too"


@pytest.mark.parametrize(
    "words", [["What is a .png?"], ["1/2 + 1/2"], ["and/or"], ["a.png", "b.png"], ["a.png", "What? " * 50]]
)
def test_questions_without_an_image_and_longer_than_a_name_are_questions(inside, words):
    done = inside("ask", "./nowhere", *words)
    assert done.exit_code == 1 and done.stderr.startswith("phi3v: ./nowhere does not exist"), done.output


@pytest.mark.parametrize(
    "words",
    [
        ["ask", "{}", "What?"],
        ["train", "{recipe}", "output={}"],
        ["train", "{recipe}", "model={}"],
        ["evaluate", "{model}", "--data", "{recipe}", "--against", "{}"],
        ["predict", "{model}", "--data", "{photos}", "--out", "{}/a.csv"],
        ["export", "{model}", "--to", "merged", "--out", "{}"],
    ],
)
def test_a_name_longer_than_names_can_be_is_one_line(inside, folder, words):
    places = {"recipe": folder / "recipe.yaml", "model": folder / "model", "photos": folder / "photos"}
    done = inside(*(word.format("n" * 300, **places) for word in words))
    said = f"phi3v: no file or folder can be called {'n' * 40}...: 300 bytes, at most 255; shorten it\n"
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", said)
