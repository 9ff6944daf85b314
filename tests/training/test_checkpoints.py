"""Checkpoints on disk: exact, whole or not at all, checked by digest, without pickle, the last good one never gone."""

import errno
import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phi3v.errors import CheckpointError, TrainingError
from phi3v.training import checkpoints
from phi3v.training.checkpoints import (
    all_checkpoints,
    begin,
    find_fault,
    newest_checkpoint,
    rotate,
    save_checkpoint,
)
from phi3v.training.state_files import random_states, read_state, set_random_states, write_state

FILES = ("adapter_model.safetensors", "optimizer.json", "rank-0.safetensors", "trainer_state.json")


def fill(folder: Path) -> None:
    for number, name in enumerate(FILES):
        (folder / name).write_bytes(bytes(range(50 + number)) * 20)


def saved(folder: Path, *steps: int) -> list[Path]:
    return [save_checkpoint(folder, step, fill, {"conditions": {}}) for step in steps]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(other) and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    shared, base = torch.arange(6.0), torch.randn(4, 4)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3), "none": None}, 7: {}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 7], "fused": None, "name": "ä"}],
        "twice": [shared, shared, base[1], base[:, 1], base.t(), torch.zeros(0, 2), base.bfloat16(), base > 0],
        "best": [float("inf"), -float("inf")],
        True: np.arange(5, dtype=np.uint32),
        "scalar": 5e-324,
    }
    write_state(tmp_path, "optimizer", state)
    found = read_state(tmp_path, "optimizer")
    assert equal(found, state) and found["twice"][0] is not base
    assert {file.name for file in tmp_path.iterdir()} == {"optimizer.json", "optimizer.safetensors"}


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3), np.random.randn(1)
    write_state(tmp_path, "rank-0", random_states())
    drawn = (random.random(), np.random.randn(3).tolist(), torch.randn(3).tolist())
    set_random_states(read_state(tmp_path, "rank-0"))
    assert drawn == (random.random(), np.random.randn(3).tolist(), torch.randn(3).tolist())


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_optimiser_of_eight_bits_goes_on(tmp_path: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    def step(weight: torch.nn.Parameter, optimiser: AdamW8bit, seed: int) -> None:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        optimiser.step()

    weight = torch.nn.Parameter(torch.ones(64, 128))  # fewer than 4,096 numbers would have states of 32 bits
    optimiser = AdamW8bit([weight], lr=0.1)
    step(weight, optimiser, 0)
    write_state(tmp_path, "optimizer", optimiser.state_dict())
    again = torch.nn.Parameter(weight.detach().clone())
    other = AdamW8bit([again], lr=0.1)
    other.load_state_dict(read_state(tmp_path, "optimizer"))
    assert other.state[again]["state1"].dtype == torch.uint8
    for seed in (1, 2):
        step(weight, optimiser, seed)
        step(again, other, seed)
        assert torch.equal(weight, again)


def test_what_only_pickle_holds_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"optimizer\.state\.0\.projector is a Linear, which pickle alone could"):
        write_state(tmp_path, "optimizer", {"state": {0: {"projector": torch.nn.Linear(1, 1)}}})
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(AssertionError, match="not \\['optimizer.pt'\\]"):
        save_checkpoint(
            tmp_path / "checkpoints", 1, lambda folder: (folder / "optimizer.pt").write_bytes(pickle.dumps(1)), {}
        )


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    place = random.randrange(len(content) * 8)
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(bytes(content))


SPOILS: dict[str, Callable[[Path], Any]] = {
    "absent": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "one bit": flip,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_any_file_that_is_not_whole_is_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, spoil: str
) -> None:
    one, two, three = saved(tmp_path, 5, 10, 15)
    assert newest_checkpoint(tmp_path) == three and not caplog.records
    SPOILS[spoil](three / name)
    assert newest_checkpoint(tmp_path) == two
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(str(three / name)) and line.endswith("; going on from checkpoint-10")
    SPOILS[spoil](two / name)
    assert newest_checkpoint(tmp_path) == one and "(and 1 more)" in caplog.records[-1].getMessage()
    SPOILS[spoil](one / name)
    with pytest.raises(CheckpointError) as error:
        newest_checkpoint(tmp_path)
    assert str(error.value).startswith(str(three / name)) and "\n" not in str(error.value)
    assert str(error.value).endswith(f"or remove {tmp_path} to train from the start")


def test_a_bit_of_a_manifest_that_is_another_is_seen_or_says_the_same(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 5)
    whole = (path / "manifest.json").read_bytes()
    for place in range(0, len(whole) * 8, 7):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        (path / "manifest.json").write_bytes(bytes(content))
        if find_fault(path) is None:
            assert json.loads(content) == json.loads(whole), place


def interrupted_saves(folder: Path, step: int, ended: Callable[[int], None]) -> int:
    """Saves a checkpoint in forked processes, the first one ended before its first call of the system, and so on.

    Returns: how many calls a whole save has.
    """
    count = 0
    while True:
        child = os.fork()
        if not child:
            calls = iter(range(count))

            def stop(original: Callable[..., Any], calls: Any = calls) -> Callable[..., Any]:
                def call(*arguments: Any, **named: Any) -> Any:
                    if next(calls, None) is None:
                        os._exit(9)
                    return original(*arguments, **named)

                return call

            for owner, name in (
                (checkpoints, "sync_file"),
                (checkpoints, "sync_folder"),
                (os, "replace"),
                (os, "unlink"),
                (os, "rmdir"),
                (os, "mkdir"),
                (Path, "write_bytes"),
                (Path, "write_text"),
            ):
                setattr(owner, name, stop(getattr(owner, name)))
            rotate(folder, save_checkpoint(folder, step, fill, {}), 2, None)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ended(count)
        if code == 0:
            return count
        count += 1


def test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 5, 10)
    newest: list[str] = []

    def ended(count: int) -> None:
        path = newest_checkpoint(tmp_path)
        assert path is not None
        newest.append(path.name)
        if path.name == "checkpoint-15":  # as it was, for the next one to be killed later
            saved(tmp_path, 5, 10)
            checkpoints._remove(path)

    calls = interrupted_saves(tmp_path, 15, ended)
    assert calls > 20 and newest == sorted(newest) and set(newest) == {"checkpoint-10", "checkpoint-15"}
    assert not caplog.records, "a save that was cut off leaves nothing that looks like a checkpoint"


def test_a_broken_checkpoint_is_replaced_when_its_step_is_done_again(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10)
    flip(tmp_path / "checkpoint-10" / FILES[0])
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    (path,) = saved(tmp_path, 10)
    assert find_fault(path) is None and [one.name for one in all_checkpoints(tmp_path)] == [
        "checkpoint-5",
        "checkpoint-10",
    ]


@pytest.mark.parametrize("where", range(12))
def test_a_full_disk_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: int) -> None:
    saved(tmp_path, 5)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    calls = iter(range(where))

    def full(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(calls, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "sync_file", full(checkpoints.sync_file))
        patch.setattr(checkpoints, "sync_folder", full(checkpoints.sync_folder))
        patch.setattr(Path, "write_bytes", full(Path.write_bytes))
        patch.setattr(Path, "write_text", full(Path.write_text))
        try:
            saved(tmp_path, 10)
            assert where >= 10
        except OSError:
            assert newest_checkpoint(tmp_path) is not None
            if not (tmp_path / "checkpoint-10").is_dir():
                assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    saved(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    def left(limit: int | None, newest: int, best: int | None = None) -> list[int]:
        folder = tmp_path / f"{limit}-{newest}-{best}"
        paths = dict(zip((10, 20, 30, 40), saved(folder, 10, 20, 30, 40), strict=True))
        rotate(folder, paths[newest], limit, paths[best] if best else None)
        return [int(path.name[11:]) for path in all_checkpoints(folder)]

    assert left(None, 40) == [10, 20, 30, 40]
    assert left(2, 40) == [30, 40] and left(1, 40) == [40]
    assert left(2, 40, best=10) == [10, 40] and left(1, 40, best=10) == [10, 40]
    assert left(2, 30) == [20, 30], "40 was broken: the run went on before it"


def keeping_best(folder: Path, bests: dict[int, int]) -> dict[int, Path]:
    """Checkpoints of steps that name the best one so far: {5: 5, 10: 5} are two, and the first is the best of both."""
    return {
        step: save_checkpoint(folder, step, fill, {"conditions": {}, "best": f"checkpoint-{best}"})
        for step, best in bests.items()
    }


def test_a_checkpoint_without_the_best_weights_comes_after_one_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run from it would end with others. Of the best one the weights alone are needed."""
    paths = keeping_best(tmp_path, {5: 5, 10: 10, 15: 10})
    SPOILS["absent"](paths[10] / "optimizer.json")
    assert newest_checkpoint(tmp_path) == paths[15] and not caplog.records
    flip(paths[10] / "adapter_model.safetensors")
    assert newest_checkpoint(tmp_path) == paths[5]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"{paths[10] / 'adapter_model.safetensors'} is damaged (the best weights up to checkpoint-15) (and 1 more); "
        "going on from checkpoint-5"
    )
    shutil.rmtree(paths[5])
    shutil.rmtree(paths[10])
    assert newest_checkpoint(tmp_path) == paths[15], "whole itself, and the only one"
    assert caplog.records[-1].getMessage() == (
        f"{paths[10] / 'manifest.json'} is missing (the best weights up to checkpoint-15); "
        "going on from checkpoint-15, with the best weights that are left"
    )
    flip(paths[15] / FILES[0])
    with pytest.raises(
        CheckpointError, match=f"no older checkpoint is whole: copy the file again, or remove {tmp_path}"
    ):
        newest_checkpoint(tmp_path)


def test_rotation_keeps_an_older_checkpoint_with_its_best_or_not_at_all(tmp_path: Path) -> None:
    """Where the newest one is the best as well, and damaged later, a run goes on from one that is complete."""
    for limit, left in ((2, [10, 40]), (3, [10, 30, 40]), (4, [10, 20, 30, 40])):
        folder = tmp_path / str(limit)
        paths = keeping_best(folder, {10: 10, 20: 10, 30: 10, 40: 40})
        rotate(folder, paths[40], limit, paths[40])
        assert [int(path.name[11:]) for path in all_checkpoints(folder)] == left
        flip(paths[40] / FILES[0])
        assert newest_checkpoint(folder) == paths[left[-2]]


def test_leftovers_of_a_save_go_with_the_next_one(tmp_path: Path) -> None:
    begin(tmp_path / ".checkpoint-5.tmp")
    fill(tmp_path / ".checkpoint-5.tmp")
    assert newest_checkpoint(tmp_path) is None
    saved(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    logging.getLogger("phi3v.training.checkpoints").propagate = True
