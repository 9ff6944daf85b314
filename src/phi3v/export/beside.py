"""A module run as a program beside this one, which ends when this one does, even by a kill.

In come a module's name and its words, out comes what it said. Its standard input is a pipe whose other end nobody but
this process holds: where that closes, the system having closed it for a process that is gone, the program removes what
would be left half made, and ends itself.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = """
import os, runpy, shutil, sys, threading

half_made = sys.argv.pop(1)

def watch():
    os.read(0, 1)
    if half_made:
        shutil.rmtree(half_made, ignore_errors=True)
    os._exit(1)

threading.Thread(target=watch, daemon=True).start()
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def run_beside(
    module: str, words: Sequence[str], removing: Path | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Runs `python -m module words` to its end; `stdout` holds both of its outputs.

    Args:
        module: its name.
        words: what stands behind it.
        removing: a folder that is removed where this process is killed meanwhile.
        **environment: what differs from this process's.

    Example: run_beside("json.tool", ["a.json"], PYTHONIOENCODING="utf-8").
    """
    theirs, ours = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-P", "-c", _PROGRAM, str(removing or ""), module, *words],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **environment},
        )
    finally:
        os.close(theirs)
        os.close(ours)
