"""A program beside an export: what it says comes back, and it does not outlive a killed export."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import phi3v
from phi3v.export.beside import run_beside

SLEEPER = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1]).with_suffix(".new").write_text(str(os.getpid()))
os.replace(Path(sys.argv[1]).with_suffix(".new"), sys.argv[1])
half = Path(sys.argv[1]).parent / "half" / "merged"
end = time.monotonic() + 120
while time.monotonic() < end:
    for number in range(200):
        half.mkdir(parents=True, exist_ok=True)
        (half / f"{number}.json").write_text("{}")
"""
PARENT = """
import sys
from pathlib import Path
from phi3v.export.beside import run_beside
run_beside("sleeper", sys.argv[1:], removing=Path(sys.argv[1]).parent / "half")
"""

LATE_PARENT = """
import sys, time
from pathlib import Path
from phi3v.export.beside import run_beside
told = Path(sys.argv[1])
run_beside("said", [], removing=told.parent / "half", afterwards=lambda: (told.touch(), time.sleep(120)))
"""


def test_words_and_outputs_are_those_of_the_module(tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text("import sys; print(__name__, sys.argv[1:]); sys.exit('and why')")
    done = run_beside("said", ["-a", "b c"], PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and sorted(done.stdout.splitlines()) == ["__main__ ['-a', 'b c']", "and why"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_it_ends_with_a_parent_that_is_killed_and_removes_what_is_half_made(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    source = str(Path(phi3v.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tmp_path}"}
    told = tmp_path / "number"
    (tmp_path / "half" / "merged").mkdir(parents=True)
    (tmp_path / "half" / "merged" / "config.json").touch()
    with subprocess.Popen([sys.executable, "-c", PARENT, str(told)], env=environment) as parent:
        wait(told.exists)
        child = int(told.read_text())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
    wait(lambda: has_ended(child))
    wait(lambda: not (tmp_path / "half").exists())  # which a program that still wrote would make again
    assert (tmp_path / "sleeper.py").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_until_afterwards_is_over_a_kill_still_removes_what_is_half_made(tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text("print('done')")
    environment = {**os.environ, "PYTHONPATH": f"{Path(phi3v.__file__).resolve().parents[1]}{os.pathsep}{tmp_path}"}
    told = tmp_path / "number"
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "genai_config.json").touch()
    with subprocess.Popen([sys.executable, "-c", LATE_PARENT, str(told)], env=environment) as parent:
        wait(told.exists)
        parent.send_signal(signal.SIGKILL)
    wait(lambda: not (tmp_path / "half").exists())


def test_what_is_made_stays_where_nobody_is_killed(tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text("print('done')")
    (tmp_path / "made").mkdir()
    seen: list[bool] = []
    done = run_beside(
        "said",
        [],
        removing=tmp_path / "made",
        afterwards=lambda: seen.append((tmp_path / "made").exists()),
        PYTHONPATH=str(tmp_path),
    )
    assert (done.returncode, done.stdout, seen) == (0, "done\n", [True]) and (tmp_path / "made").exists()


def wait(until) -> None:
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


def has_ended(process: int) -> bool:
    """Also where nobody has asked for its exit code: a container may have no init that does."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"
