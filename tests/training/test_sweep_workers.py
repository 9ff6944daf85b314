"""Several processes at one sweep, from the command line, and one that is killed for good."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import phi3v

pytest.importorskip("optuna", reason="sweeps need Optuna")


@pytest.mark.slow
@pytest.mark.timeout(900)  # six starts of an interpreter with torch, on a machine that others use
def test_workers_share_a_sweep_and_one_that_is_killed_is_replaced(make: Callable[..., phi3v.Recipe]) -> None:
    """Two workers on a journal file; SIGKILL takes one call away in its first trial, SIGTERM the next one."""
    search = {"training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    training = {"epochs": 15, "micro_batch_size": 4, "save_steps": 5}
    recipe = make("shared", data={"split": {"validation": 4}}, training=training, sweep={"search": search, "trials": 4})
    file, folder = Path(recipe.output).with_suffix(".yaml"), Path(recipe.output)
    journal = folder.parent / "journal"
    file.write_text(
        recipe.with_overrides([f"sweep.storage={journal}", "sweep.pruner=null"]).to_yaml(), encoding="utf-8"
    )

    def call(*words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "phi3v", "sweep", str(file), "--json", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))

    def wait_for(found: Callable[[], bool]) -> None:
        for _ in range(1200):
            if found():
                return
            time.sleep(0.2)
        raise AssertionError("waited for four minutes")

    killed = call()
    wait_for(lambda: (folder / "trials" / "0000" / "metrics.jsonl").is_file())
    killed.kill()
    killed.communicate()
    stopped = call("sweep.workers=2")
    wait_for(lambda: (folder / "trials" / "0001" / "metrics.jsonl").is_file())
    stopped.send_signal(signal.SIGTERM)
    said, told = stopped.communicate(timeout=240)
    assert stopped.returncode == 143 and b"interrupted; the same command again goes on" in told
    assert "interrupted" in json.loads(said)["error"]
    whole = call("sweep.workers=2")
    said, told = whole.communicate(timeout=400)
    result = json.loads(said)
    assert whole.returncode == 0, told.decode()
    assert result["status"] == "complete" and result["ranking"]["states"] == {"complete": 4}
    assert sorted(line["trial"] for line in result["ranking"]["trials"]) == [0, 1, 2, 3]
    assert len({line["values"]["training.learning_rate"] for line in result["ranking"]["trials"]}) == 4
    again = call()
    assert json.loads(again.communicate()[0])["status"] == "finished"
