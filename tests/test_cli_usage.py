"""Before a command has begun: slips in its line are exit code 2 and a line that says what, Ctrl-C is 130 and a line."""

import json
import logging
import os
import signal
import subprocess
import sys

import pytest
import typer

from phi3v import cli_session

SLIPS = [
    (["train", "r.yaml", "=3"], "'=3' is not key=value"),
    (["train", "r.yaml", "training.=3"], "'training.=3' is not key=value"),
    (["train", "r.yaml", ""], "'' is not key=value"),
    (["train", ""], "'RECIPE': it is empty"),
    (["profile", " "], "'RECIPE': it is empty"),
    (["plan", ""], "'RECIPE': it is empty"),
    (["doctor", ""], "'RECIPE': it is empty"),
    (["profile", "r.yaml", "--trace", ""], "'--trace': it is empty"),
    (["profile", "r.yaml", "--image", ""], "--image: nothing (beside a comma or +, say) is no size"),
    (["profile", "r.yaml", "--image", "64x48"], "photos have their sizes: add --rows"),
    (["profile", "r.yaml", "--words", "9"], "answers have their lengths: add --rows"),
    (["plan", "r.yaml", "--image", "64x48"], "photos have their sizes: add --rows"),
    (["evaluate", "runs/shop", "--data", ""], "'--data': it is empty"),
    (["evaluate", "runs/shop", "--against", " "], "'--against': it is empty"),
    (["evaluate", "runs/shop", "--metrics", "anls,rouge"], "--metrics: 'rouge' is no metric; there are exact_match,"),
    (["evaluate", "runs/shop", "--device", ""], "'--device': it is empty"),
    (["evaluate", ""], "'TARGET': it is empty"),
    (["ask", "", "a.png", "What?"], "'TARGET': it is empty"),
    (["ask", "runs/shop", "", "What?"], "an image is empty; name a file"),
    (["ask", "runs/shop", "a.png", ""], "the question is empty"),
    (["ask", "runs/shop", "phto.png"], "phto.png looks like the name of an image, and no such file is here"),
    (["ask", "runs/shop", "my photos/Scarf 1.JPG"], "looks like the name of an image"),
    (["ask", "runs/shop", "./photos/scarf"], "looks like the name of an image"),
    (["ask", "runs/shop", "https://shop.example/1"], "looks like the name of an image"),
    (["ask", "runs/shop", "a.png", "\udcff\ud83d"], "the question is not UTF-8"),
    (["ask", "--device", "", "runs/shop", "What?"], "'--device': it is empty"),
    (["serve", "runs/shop", "--host", ""], "'--host': it is empty"),
    (["serve", "runs/shop", "--adapter", "hats"], "--adapter: 'hats' is not name=path"),
    (["serve", "runs/shop", "--adapter", "a=b", "--adapter", "a=c"], "'a' is named twice"),
    (["data", "check", " "], "it is empty"),
    (["data", "show", ""], "it is empty"),
    (["data", "check", "a.tar", __file__], "is a second file: put quotes around a pattern ('shards/*.tar')"),
    (["data", "show", "r.yaml", "--out", ""], "'--out': it is empty"),
    (["demo", "--output", ""], "'--output': it is empty"),
    ([""], "No such command"),
    (["train"], "Missing argument 'RECIPE'"),
    (["evaluate", "runs/shop", "--row", "3"], "No such option: --row"),
]
PROGRAM = """
import json, sys
from typer.testing import CliRunner
from phi3v.cli import app
results = [CliRunner().invoke(app, words) for words in json.loads(sys.argv[1])]
heavy = [name for name in ("torch", "transformers", "PIL") if name in sys.modules]
print(json.dumps([heavy, [(one.exit_code, one.stdout, one.stderr) for one in results]]))
"""


def test_a_slip_is_a_usage_error() -> None:
    lines = [words for words, _ in SLIPS]
    lines += [[*words, "--json"] for words in lines] + [["--json"], ["train", "r.yaml", "--", "--json"]]
    command = [sys.executable, "-c", PROGRAM, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    heavy, results = json.loads(done.stdout)
    assert not heavy
    plain, for_machines, (root, beyond) = results[: len(SLIPS)], results[len(SLIPS) : -2], results[-2:]
    for (words, expected), (code, out, err) in zip(SLIPS, plain, strict=True):
        assert code == 2 and out == "", words
        assert expected in " ".join(err.replace("│", " ").split()) and "Traceback" not in err, words
    for (words, expected), (code, out, err), (_, _, said) in zip(SLIPS, for_machines, plain, strict=True):
        answer = json.loads(out)
        assert code == 2 and list(answer) == ["error"] and expected in answer["error"], words
        assert "Traceback" not in err and err == said, words
    assert root[0] == 2 and json.loads(root[1])["error"].startswith("No such option: --json")
    assert beyond[:2] == [2, ""], "behind -- it is no option"


def test_a_warning_of_ours_is_one_line_and_said_once(capsys):
    logger = logging.getLogger("phi3v_tested_here.inner")
    for _ in range(2):
        cli_session.show_warnings("phi3v_tested_here")
        logger.warning("left out: %s", "ki\nnd")
    logger.warning("left out: %s", "more")
    assert capsys.readouterr().err == "phi3v: left out: ki nd\nphi3v: left out: more\n"


def test_a_current_folder_that_was_deleted_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(typer.Exit), cli_session.session():
        raise AssertionError
    line = "phi3v: the current folder was deleted: change to another one (cd) and run it again\n"
    assert capsys.readouterr().err == line


EARLY = """
import os, signal, sys
module = sys.argv.pop(1)
class Send:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Send())
from phi3v.__main__ import main
main()
"""
"""Gets Ctrl-C while a module is imported."""


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("module", ["typer", "huggingface_hub"])
@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_before_a_command_has_begun_is_one_line(tmp_path, module, ignored):
    """While the command line is imported, and the first library before a command looks after itself. Where the
    signal is ignored, as behind nohup, the command goes on to its own end.
    """
    done = subprocess.run(
        [sys.executable, "-c", EARLY, module, "train", "nowhere.yaml", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )
    code, line = (1, "nowhere.yaml cannot be read") if ignored else (130, "interrupted")
    assert done.returncode == code and line in json.loads(done.stdout)["error"]
    assert done.stderr.startswith("phi3v: ") and done.stderr.count("\n") == 1


def test_python_ends_without_a_look_through_all_objects():
    """It took seconds of each command's end, when its last line was on the screen."""
    program = "import atexit, gc\nfrom phi3v.__main__ import main\n"
    program += "atexit.register(lambda: print(len(gc.get_objects())))\nmain()"
    done = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) < 1000, "objects that are looked through for cycles"
