"""What every store of features promises; what the one on disk does about damaged files, bounds and other processes."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phi3v.features.files import FeatureFolder, default_folder
from phi3v.features.opening import open_store
from phi3v.features.store import FeatureMemory, FeatureStore

MakeStore = Callable[[int], FeatureStore]
SIZE = 8 * 64 * 4
FILE = 2_400
"""More than a file of such features takes, less than one and a half of them."""


def name(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def features(number: int) -> torch.Tensor:
    return torch.arange(512, dtype=torch.float32).view(8, 64) + number


def folder_bytes(folder: Path) -> int:
    """What the kept files take; one that goes meanwhile takes nothing."""
    total = 0
    for path in folder.glob("??/*.safetensors"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.fixture(params=["memory", "disk"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    """Makes a store with room for so many of our features; the same folder each time for the one on disk."""
    if request.param == "memory":
        return lambda count: FeatureMemory(count * FILE)
    return lambda count: FeatureFolder(count * FILE, tmp_path)


def test_what_is_kept_comes_back_bit_for_bit(make_store: MakeStore) -> None:
    store = make_store(3)
    odd = torch.tensor([[0.1, -0.0], [float("inf"), 1e-40]]).to(torch.bfloat16)
    assert store.get(name(1)) is None and not store.hold(name(1))
    assert store.put(name(1), features(1)) and store.put(name(2), odd)
    for number, expected in ((1, features(1)), (2, odd)):
        found = store.get(name(number))
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_what_a_run_holds_stays_and_what_does_not_fit_is_refused(make_store: MakeStore) -> None:
    store = make_store(3)
    assert [store.put(name(number), features(number)) for number in range(5)] == [True, True, True, False, False]
    assert store.held_bytes <= store.limit_bytes and not store.fits(SIZE)
    assert [store.get(name(number)) is not None for number in range(5)] == [True, True, True, False, False]
    assert store.put(name(1), features(1))  # it is there already


def test_a_new_run_takes_the_place_of_what_was_used_longest_ago(make_store: MakeStore) -> None:
    store = make_store(4)
    for number in range(4):
        store.put(name(number), features(number))
        time.sleep(0.02)  # times of files are not finer than a clock tick
    store.begin()
    assert store.hold(name(0))
    assert store.put(name(4), features(4))
    left = [number for number in range(5) if store.get(name(number)) is not None]
    assert left == [0, 2, 3, 4] or left == [0, 3, 4]  # the folder makes a sixteenth more room at once


def test_a_store_is_opened_as_a_recipe_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, disk = open_store("memory", 1.5), open_store("disk", 0.5, tmp_path)
    assert (memory.kind, memory.limit_bytes) == ("memory", 1_500_000_000)
    assert isinstance(disk, FeatureFolder) and (disk.folder, disk.limit_bytes) == (tmp_path, 500_000_000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "phi3v" / "features"
    assert open_store("disk", 1.0).folder == default_folder() and not default_folder().exists()


def test_the_layout_on_disk(tmp_path: Path) -> None:
    """Other programs may read it; a change makes every folder useless."""
    assert FeatureFolder(10 * FILE, tmp_path).put(name(1), features(1))
    path = tmp_path / name(1)[:2] / f"{name(1)}.safetensors"
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        [path.relative_to(tmp_path), Path("size")]
    )
    assert torch.equal(load_file(path)["features"], features(1))
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]
    digest = hashlib.sha256(b"torch.float32 [8, 64] " + features(1).numpy().tobytes()).hexdigest()
    assert header == {"name": name(1), "sha256": digest}
    assert (tmp_path / "size").read_text() == f"{len(raw):020d}\n"


def test_features_on_disk_are_read_where_they_lie(tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps to see which files are mapped")
    store = FeatureFolder(10 * FILE, tmp_path)
    store.put(name(1), features(1))
    found = store.get(name(1))
    path = str(tmp_path / name(1)[:2] / f"{name(1)}.safetensors")
    assert path in Path("/proc/self/maps").read_text()
    os.unlink(path)  # by another process
    assert torch.equal(found, features(1)) and store.get(name(1)) is None


def test_half_files_and_flipped_bits_are_never_taken_for_good(tmp_path: Path) -> None:
    FeatureFolder(10 * FILE, tmp_path).put(name(1), features(1))
    path = tmp_path / name(1)[:2] / f"{name(1)}.safetensors"
    whole = path.read_bytes()
    spoiled = [whole[:length] for length in (0, 5, 8, 100, len(whole) - SIZE, len(whole) - 1)] + [whole + b"!"]
    spoiled += [
        whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        for at in [*range(300), *range(300, len(whole), 37)]
    ]
    for content in spoiled:
        path.write_bytes(content)
        store = FeatureFolder(10 * FILE, tmp_path)
        assert not store.hold(name(1)) and store.get(name(1)) is None and not path.exists()
    assert store.put(name(1), features(1)) and torch.equal(load_file(path)["features"], features(1))
    path.write_bytes(whole[:-1] + b"?")  # after it was found good
    assert store.get(name(1)) is None


def test_a_file_under_another_name_is_not_good(tmp_path: Path) -> None:
    store = FeatureFolder(10 * FILE, tmp_path)
    store.put(name(1), features(1))
    wrong = tmp_path / name(2)[:2] / f"{name(2)}.safetensors"
    wrong.parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / name(1)[:2] / f"{name(1)}.safetensors", wrong)
    assert store.get(name(2)) is None and not wrong.exists()


@pytest.mark.parametrize("size", [b"", b"many", b"00000000000000000000\n", b"9" * 19], ids=["empty", "text", "0", "9s"])
def test_a_wrong_count_is_mended(size: bytes, tmp_path: Path) -> None:
    """A process that was killed leaves a count that is too high."""
    first = FeatureFolder(3 * FILE, tmp_path)
    first.put(name(0), features(0))
    (tmp_path / "size").write_bytes(size)
    store = FeatureFolder(3 * FILE, tmp_path)
    for number in range(1, 3):
        assert store.put(name(number), features(number))
    if size.strip(b"0\n"):
        assert int((tmp_path / "size").read_text()) == folder_bytes(tmp_path)


def test_a_smaller_bound_holds_from_the_beginning(tmp_path: Path) -> None:
    store = FeatureFolder(8 * FILE, tmp_path)
    for number in range(8):
        assert store.put(name(number), features(number))
    smaller = FeatureFolder(3 * FILE, tmp_path)
    smaller.begin()
    assert 0 < folder_bytes(tmp_path) <= 3 * FILE


def test_a_folder_that_cannot_be_written_is_said_and_not_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = FeatureFolder(3 * FILE, tmp_path / "file" / "features")
    assert not store.put(name(1), features(1)) and not store.hold(name(1)) and store.get(name(1)) is None
    assert "cannot be written (Not a directory)" in str(store.trouble) and not store.fits(1)


def test_what_stands_in_the_place_of_one_file_stops_that_file_alone(tmp_path: Path) -> None:
    (tmp_path / name(1)[:2] / f"{name(1)}.safetensors").mkdir(parents=True)
    (tmp_path / name(2)[:2]).write_text("no folder")
    store = FeatureFolder(2 * FILE, tmp_path)
    for number in (1, 2):
        assert not store.put(name(number), features(number)) and store.get(name(number)) is None
        assert f"{name(number)}.safetensors cannot be written (" in str(store.trouble) and store.fits(1)
    store.begin()
    assert store.put(name(3), features(3)) and torch.equal(store.get(name(3)), features(3))


def test_what_can_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FeatureFolder(9 * FILE, tmp_path).put(name(1), features(1))

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr("phi3v.features.files.Scratch", refuse)
    store = FeatureFolder(9 * FILE, tmp_path)
    assert not store.put(name(2), features(2)) and "(Permission denied)" in str(store.trouble)
    assert store.hold(name(1)) and torch.equal(store.get(name(1)), features(1))


def test_a_store_on_disk_can_be_given_to_loader_workers(tmp_path: Path) -> None:
    store = FeatureFolder(3 * FILE, tmp_path)
    store.put(name(1), features(1))
    assert torch.equal(pickle.loads(pickle.dumps(store)).get(name(1)), features(1))


def kept_files(folder: Path) -> int:
    """Files of features; folders may go away while they are counted, which `rglob` does not bear."""
    return sum(file.endswith(".safetensors") for _, _, files in os.walk(folder) for file in files)


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_half(tmp_path: Path) -> None:
    dice = random.Random(0)
    context = multiprocessing.get_context("fork")
    for start in range(0, 8_000, 1_000):
        process = context.Process(target=_fill, args=(tmp_path, 10_000, range(start, start + 1_000)))
        process.start()
        before = kept_files(tmp_path)
        while kept_files(tmp_path) == before:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for path in tmp_path.rglob("*.safetensors"):
            number = int(load_file(path)["features"][0, 0])
            assert path.name == f"{name(number)}.safetensors"
            assert torch.equal(load_file(path)["features"], features(number))
    store = FeatureFolder(10_000 * FILE, tmp_path)
    assert store.put(name(-1), features(-1)) and not (tmp_path / "tmp").exists()
    assert int((tmp_path / "size").read_text()) >= folder_bytes(tmp_path)


def test_many_processes_share_one_folder_and_its_bound(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    works = [range(start, start + 30) for start in (0, 0, 15, 30, 45)]
    processes = [context.Process(target=_fill, args=(tmp_path, 20, numbers)) for numbers in works]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert folder_bytes(tmp_path) <= 20 * FILE
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0] * 5
    assert sorted(os.listdir(tmp_path))[-1] == "size" and not (tmp_path / "tmp").exists()
    assert int((tmp_path / "size").read_text()) == folder_bytes(tmp_path) <= 20 * FILE


def _fill(folder: Path, count: int, numbers: range) -> None:
    """Keeps many features; what is there is what was put there."""
    store = FeatureFolder(count * FILE, folder)
    for number in numbers:
        store.put(name(number), features(number))
        found = store.get(name(number))
        assert found is None or torch.equal(found, features(number))
