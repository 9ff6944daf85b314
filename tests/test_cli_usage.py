"""Slips in a command line: exit code 2 and a line that says what, before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "r.yaml", "=3"], "'=3' is not key=value"),
        (["train", "r.yaml", "training.=3"], "'training.=3' is not key=value"),
        (["evaluate", "runs/shop", "--data", ""], "'--data': it is empty"),
        (["evaluate", ""], "it is empty"),
        (["ask", "", "a.png", "What?"], "it is empty"),
        (["ask", "runs/shop", "", "What?"], "an image is empty; name a file"),
        (["data", "check", " "], "it is empty"),
    ],
)
def test_a_slip_is_a_usage_error(tmp_path: Path, words: list[str], expected: str) -> None:
    command = [sys.executable, "-m", "phi3v", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert expected in " ".join(done.stderr.replace("│", " ").split()) and "Traceback" not in done.stderr
