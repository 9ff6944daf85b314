"""Runs that are killed, stopped and starved at random moments, as often as `PHI3V_TORTURE` says (100).

Each test has a short form in `make test`, under tests/training. Everything here starts the command line in processes of
its own, and what a run ends with is compared with the undisturbed run's, bit by bit. A line with the counts is printed.
With CUDA_VISIBLE_DEVICES=0 the runs are on a GPU, with deterministic algorithms.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_ends import HARD, assert_same_end, end_of
from tiny_models import write_photos, write_tiny_model
from torture_server import DEVICES, Running, Server

from phi3v.training.checkpoints import all_checkpoints, find_fault

COUNT = int(os.environ.get("PHI3V_TORTURE", "100"))
SEED = int(os.environ.get("PHI3V_TORTURE_SEED", "0"))
pytestmark = [pytest.mark.torture, pytest.mark.timeout(6 * 3600)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as one:
        yield one


class Bench:
    """One recipe, its undisturbed run, and fresh folders for others."""

    def __init__(self, folder: Path, server: Server, workers: int, **training: Any) -> None:
        self.folder, self.server = folder, server
        folder.mkdir(parents=True)
        again = {"dataloader_num_workers": workers, "full_determinism": bool(DEVICES)}
        rows = {
            "train": str(write_photos(folder / "photos", 20)),
            "prompt": "Which colour?",
            "answer": "It is {colour}.",
        }
        values = {
            **HARD,
            "model": str(write_tiny_model(folder / "model")),
            "data": {**HARD["data"], **rows},
            "training": {**HARD["training"], **again, **training},
        }
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(values))
        code, self.seconds = self.run("undisturbed")
        assert code == 0, self.log.read_text()
        self.expected = end_of(folder / "undisturbed")

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def arguments(self, name: str) -> list[str]:
        return ["train", str(self.recipe), f"output={self.folder / name}"]

    def start(self, name: str) -> Running:
        return self.server.start(*self.arguments(name), log=self.log)

    def run(self, name: str, file_limit: int = 0) -> tuple[int, float]:
        return self.server.run(*self.arguments(name), log=self.log, file_limit=file_limit)

    def has_missed(self, run: Running, missed: int, wanted: int) -> None:
        """A run was done before its signal: the undisturbed one may have taken long on a machine that was busy then."""
        self.seconds = min(self.seconds, run.seconds)
        assert missed <= 5 * wanted, f"signals come when runs are done, which take {self.seconds:.1f} s"

    def finish(self, name: str) -> None:
        """Runs to the end, compares, and removes the folder."""
        code, _ = self.run(name)
        assert code == 0, self.log.read_text()[-2000:]
        assert_same_end(end_of(self.folder / name), self.expected)
        shutil.rmtree(self.folder / name)


@pytest.fixture(scope="module", params=[0, 2], ids=["0 workers", "2 workers"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: Server) -> Bench:
    return Bench(tmp_path_factory.mktemp("torture") / "bench", server, request.param)


def saves_since(folder: Path, began: float) -> bool:
    """Whether a checkpoint is being written that was begun since then; a killed run before may have left another."""
    for path in (folder / "checkpoints").glob(".checkpoint-*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it is whole, or cleared away
            if path.stat().st_mtime >= began:
                return True
    return False


def wait_for_a_save(folder: Path, began: float, seconds: float) -> None:
    """Returns as soon as a checkpoint is being written, or when so many seconds are over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not saves_since(folder, began):
        time.sleep(0.0005)


def hit(run: Running, folder: Path, number: int, within: float, dice: random.Random, in_save: bool) -> bool:
    """Sends a signal at a uniformly random moment, or in a save; True where a save was going on."""
    began = time.time()
    time.sleep(dice.uniform(0, within))
    if in_save:
        wait_for_a_save(folder, began, within)
        time.sleep(dice.uniform(0, 0.02))
    run.send(number)
    return saves_since(folder, began)


def test_kills(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A third is aimed into a save, more where fewer than a quarter fell into one; each run is hit at least once."""
    dice = random.Random(SEED)
    runs = max(COUNT // 2, 1)
    kills = saves = missed = 0
    for trial in range(runs):
        folder, before, wanted = bench.folder / f"killed-{trial}", kills, dice.randint(1, 3)
        while wanted:
            run = bench.start(folder.name)
            aimed = (trial + wanted) % 3 == 0 or 4 * saves <= kills
            saving = hit(run, folder, signal.SIGKILL, bench.seconds * 0.9, dice, in_save=aimed)
            wanted -= 1
            if run.ends() == 137:
                kills, saves = kills + 1, saves + saving
            elif not wanted and kills == before:  # it was done before the signal came: this one does not count
                missed, wanted = missed + 1, 1
                bench.has_missed(run, missed, runs)
                shutil.rmtree(folder)
        assert not [path for path in all_checkpoints(folder / "checkpoints") if find_fault(path)]
        bench.finish(folder.name)
    with capsys.disabled():
        print(f"\n{runs} runs, {kills} kills, {saves} of them in a save: all ended as the undisturbed one")
    assert kills >= runs
    assert 5 * saves >= kills or kills < 10, "too few kills in a save; a handful of runs says nothing about that"


def test_signals(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run is stopped: one that was done before its signal came begins again, and does not count."""
    dice = random.Random(SEED + 1)
    slowest, saves, stops, missed = 0.0, 0, 0, 0
    count = max(COUNT // 4, 2)
    while stops < count:
        folder, number = bench.folder / f"stopped-{stops}", (signal.SIGTERM, signal.SIGINT)[stops % 2]
        run = bench.start(folder.name)
        saving = hit(run, folder, number, bench.seconds * 0.9, dice, in_save=stops % 4 == 0)
        sent = time.monotonic()
        code = run.ends()
        slowest = max(slowest, time.monotonic() - sent)
        assert code in (128 + number, 0), bench.log.read_text()[-2000:]
        if code == 0:
            missed += 1
            bench.has_missed(run, missed, count)
            shutil.rmtree(folder)
            continue
        stops, saves = stops + 1, saves + saving
        assert not [path for path in all_checkpoints(folder / "checkpoints") if find_fault(path)]
        bench.finish(folder.name)
    assert slowest < 10
    with capsys.disabled():
        print(f"\n{stops} runs stopped, {saves} in a save, the slowest after {slowest:.2f} s")


def test_second_signals(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run is stopped, within a second of its second signal; which of the two ended it is not told apart."""
    dice = random.Random(SEED + 2)
    slowest, stops, missed = 0.0, 0, 0
    count = max(COUNT // 10, 2)
    while stops < count:
        folder = bench.folder / f"twice-{stops}"
        run = bench.start(folder.name)
        hit(run, folder, signal.SIGTERM, bench.seconds * 0.9, dice, in_save=True)
        time.sleep(dice.choice([0.0, 0.002, 0.01]))
        run.send(signal.SIGTERM)
        sent = time.monotonic()
        code = run.ends()
        assert code in (143, 0), bench.log.read_text()[-2000:]
        if code == 0:  # it was done before the first came
            missed += 1
            bench.has_missed(run, missed, count)
            shutil.rmtree(folder)
            continue
        stops, slowest = stops + 1, max(slowest, time.monotonic() - sent)
        bench.finish(folder.name)
    assert slowest < 1
    with capsys.disabled():
        print(f"\n{stops} runs stopped by two signals, the slowest {slowest:.2f} s after the second")


def test_files_that_may_not_grow(bench: Bench) -> None:
    """A limit on the size of files ends a save at each of its files, as a full disk does; here for real."""
    sizes = sorted({file.stat().st_size for file in (bench.folder / "undisturbed").rglob("*") if file.is_file()})
    refused = 0
    for trial, size in enumerate(sizes):
        name = f"limited-{trial}"
        code, _ = bench.run(name, file_limit=max(size - 1, 1))
        refused += code == 1
        assert code in (0, 1), bench.log.read_text()[-2000:]
        assert "Traceback" not in bench.log.read_text()
        bench.finish(name)
    assert refused > 3


def test_full_disks(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A file system of its own, of each size between nothing and enough."""
    size = sum(file.stat().st_size for file in (bench.folder / "undisturbed").rglob("*") if file.is_file())
    place = bench.folder / "disk"
    place.mkdir()
    levels, refused = max(COUNT // 8, 4), 0
    for level in range(levels):
        limit = int(size * (0.1 + 1.4 * level / levels))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small file system")
        try:
            code, _ = bench.run("disk/run")
            refused += code == 1
            assert code in (0, 1), bench.log.read_text()[-2000:]
            assert not [path for path in all_checkpoints(place / "run" / "checkpoints") if find_fault(path)]
            subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(place)], check=True)
            bench.finish("disk/run")
        finally:
            subprocess.run(["umount", str(place)], check=True)
    assert refused >= levels // 2
    with capsys.disabled():
        print(f"\n{levels} disks, {refused} of them full before the end")
