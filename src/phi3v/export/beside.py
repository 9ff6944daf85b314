"""A module run as a program beside this one, which ends when this one does, even by a kill.

In come a module's name and its words, out comes what it said. A watcher starts the program. Its standard input is a
pipe whose other end nobody but this process holds: where that closes without a word, the system having closed it for a
process that is gone, the watcher ends the program first, and then removes what is left half made.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_WATCHED = """
import os, runpy, sys, threading

def watch():
    os.read(0, 1)
    os._exit(1)

threading.Thread(target=watch, daemon=True).start()
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""The program: it ends where its watcher is gone."""

_WATCHER = """
import os, shutil, subprocess, sys, threading

half_made, program, *words = sys.argv[1:]
running = subprocess.Popen([sys.executable, "-P", "-c", program, *words], stdin=subprocess.PIPE)
alone = threading.Event()

def watch():
    if not os.read(0, 1):
        alone.set()
        running.kill()

watching = threading.Thread(target=watch)
watching.start()
code = running.wait()
os.close(1), os.close(2)  # who reads them knows by that
watching.join()
if alone.is_set() and half_made:
    shutil.rmtree(half_made, ignore_errors=True)
os._exit(code if code >= 0 else 128 - code)
"""
"""A small process between: a program that removed its files itself would write on meanwhile."""


def run_beside(
    module: str,
    words: Sequence[str],
    removing: Path | None = None,
    afterwards: Callable[[], object] = lambda: None,
    **environment: str,
) -> "subprocess.CompletedProcess[str]":
    """Runs `python -m module words` to its end; `stdout` holds both of its outputs.

    Args:
        module: its name.
        words: what stands behind it.
        removing: a folder that is removed where this process is killed meanwhile, or in `afterwards`.
        afterwards: called when the program has ended, in whatever way.
        **environment: what differs from this process's.

    Example: run_beside("json.tool", ["a.json"], PYTHONIOENCODING="utf-8").
    """
    command = [sys.executable, "-P", "-c", _WATCHER, str(removing or ""), _WATCHED, module, *words]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        start_new_session=True,  # a signal to the terminal's whole group would end the watcher too
    ) as watcher:
        assert watcher.stdin is not None and watcher.stdout is not None
        try:
            said = watcher.stdout.read()
            afterwards()
            with contextlib.suppress(BrokenPipeError):  # of a watcher that was killed itself
                watcher.stdin.write("!")
                watcher.stdin.flush()
        finally:
            with contextlib.suppress(BrokenPipeError):
                watcher.stdin.close()  # of an interrupted export the program ends before anything is removed
            watcher.wait()
    return subprocess.CompletedProcess(command, watcher.returncode, said)
