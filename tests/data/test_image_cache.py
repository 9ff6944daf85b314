"""The cache on disk: its layout, what it takes for good, and many processes at once."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from phi3v.data.image_cache import FetchFailure, ImageCache
from phi3v.errors import DataError

URL = "https://shop.example/a.jpg?token=secret"
URL_HASH = hashlib.sha256(URL.encode()).hexdigest()
CONTENT = b"the bytes of an image"
CONTENT_HASH = hashlib.sha256(CONTENT).hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keep(cache: ImageCache, url: str, content: bytes) -> int:
    with cache.writing() as writer:
        file = writer.temporary()
        file.write_bytes(content)
        return writer.keep(url, file)


def test_the_layout(tmp_path: Path) -> None:
    """Other programs may rely on it; a change makes every cache useless."""
    cache = ImageCache(tmp_path)
    assert keep(cache, URL, CONTENT) == 21
    assert keep(cache, "https://shop.example/same.jpg", CONTENT) == 21
    with cache.writing() as writer:
        writer.remember("https://shop.example/gone.jpg", FetchFailure("url_gone", "it was taken away"))
    place = f"objects/{CONTENT_HASH[:2]}/{CONTENT_HASH[2:4]}/{CONTENT_HASH}"
    entry = json.dumps({"bytes": 21, "object": CONTENT_HASH}).encode() + b"\n"
    failure = b'{"failure": "url_gone", "message": "it was taken away"}\n'
    entries = {URL: entry, "https://shop.example/same.jpg": entry, "https://shop.example/gone.jpg": failure}
    names = {hashlib.sha256(url.encode()).hexdigest(): content for url, content in entries.items()}
    expected = {f"urls/{name[:2]}/{name[2:4]}/{name}": content for name, content in names.items()}
    assert tree(tmp_path) == {place: CONTENT, **expected}
    assert cache.path(URL) == tmp_path / place and cache.failure(URL) is None
    assert cache.failure("https://shop.example/gone.jpg") == FetchFailure("url_gone", "it was taken away")


def test_a_cache_can_be_pickled_and_makes_no_folder_by_itself(tmp_path: Path) -> None:
    cache = pickle.loads(pickle.dumps(ImageCache(tmp_path / "cache")))
    assert (cache, cache.path(URL), cache.failure(URL)) == (ImageCache(tmp_path / "cache"), None, None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("lost", ["outer", "own"])
def test_a_folder_that_never_comes_is_one_line_and_no_hang(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below /proc, and where a mount is gone, the system answers a mkdir with "no such file"."""
    make = Path.mkdir

    def refuse(path: Path, **options: Any) -> None:
        if path.name == "cache" if lost == "outer" else path.parent.name == "tmp":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        make(path, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(DataError, match=r"image cache .*cache cannot be written \(.*\): .* data.image_cache"),
        ImageCache(tmp_path / "cache").writing(),
    ):
        pass


@pytest.mark.parametrize(
    "content",
    [b"", CONTENT[:-1], CONTENT + b"!", bytes(len(CONTENT))],
    ids=["empty", "cut off", "longer", "as long"],
)
def test_a_file_that_was_written_to_is_not_there_and_is_replaced(content: bytes, tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    keep(cache, URL, CONTENT)
    cache.path(URL).write_bytes(content)
    assert cache.path(URL) is None
    keep(cache, URL, CONTENT)
    assert cache.path(URL).read_bytes() == CONTENT


def test_bytes_are_read_again_only_where_the_file_is_not_older_than_its_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(tmp_path)
    keep(cache, URL, CONTENT)
    path = cache.path(URL)
    now = path.stat().st_mtime_ns
    os.utime(tmp_path / "urls" / URL_HASH[:2] / URL_HASH[2:4] / URL_HASH, ns=(now, now))
    read: list[object] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: read.append(given) or digest(*given))
    for moved, times in ((-1, 0), (0, 1), (1, 2)):  # older: taken as it is; of the same time, newer: looked at
        os.utime(path, ns=(now + moved, now + moved))
        assert cache.path(URL) == path and len(read) == times


@pytest.mark.parametrize(
    "entry",
    [
        b"",
        b'{"bytes": 21, "obj',
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"object": 7, "bytes": 21}',
        b'{"object": "../../../../etc/passwd", "bytes": 21}',
        b'{"failure": 7, "message": null}',
    ],
)
def test_an_entry_that_is_none_is_not_there(entry: bytes, tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    keep(cache, URL, CONTENT)
    (tmp_path / "urls" / URL_HASH[:2] / URL_HASH[2:4] / URL_HASH).write_bytes(entry)
    assert (cache.path(URL), cache.failure(URL)) == (None, None)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    ready, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_write_and_wait, args=(cache, child))
    process.start()
    ready.recv()
    (tmp_path / "tmp" / "killed-before-its-lock").mkdir()
    keep(cache, URL, CONTENT)
    (living,) = (tmp_path / "tmp").iterdir()
    assert sorted(path.read_bytes() for path in living.iterdir()) == [b"", b"half an im"]
    process.kill()
    process.join()
    assert living.exists()
    keep(cache, URL, CONTENT)
    assert not (tmp_path / "tmp").exists()


def _write_and_wait(cache: ImageCache, ready: Connection) -> None:
    with cache.writing() as writer:
        writer.temporary().write_bytes(b"half an im")
        ready.send("ready")
        time.sleep(60)


@pytest.mark.parametrize("files", [["half"], ["half", "lock"]], ids=["without a lock", "of another machine"])
def test_a_folder_whose_lock_says_nothing_is_removed_after_a_day(files: list[str], tmp_path: Path) -> None:
    """Some file systems have no locks, some keep them to one machine, and a name that is not ours is another's."""
    old = tmp_path / "tmp" / "0123456789ab-0"
    old.mkdir(parents=True)
    for name in files:
        (old / name).write_bytes(b"half an im")
    keep(ImageCache(tmp_path), URL, CONTENT)
    assert sorted(os.listdir(old)) == files
    os.utime(old, (time.time() - 90_000,) * 2)
    keep(ImageCache(tmp_path), URL, CONTENT)
    assert not (tmp_path / "tmp").exists()


def test_many_processes_fill_one_cache(tmp_path: Path) -> None:
    """Each writes everything at the same time, half of them are killed: the cache is that of one writer alone."""
    _fill(ImageCache(tmp_path / "alone"))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(ImageCache(tmp_path / "many"),)) for _ in range(8)]
    for process in processes:
        process.start()
    for number, process in enumerate(processes[:4]):
        time.sleep(0.01 * number)
        process.kill()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes[4:]] == [0] * 4
    _fill(ImageCache(tmp_path / "many"))
    assert tree(tmp_path / "many") == tree(tmp_path / "alone")
    assert sorted(os.listdir(tmp_path / "many")) == ["objects", "urls"]


def _fill(cache: ImageCache) -> None:
    for number in range(40):
        url = f"https://shop.example/{number}.jpg"
        content = str(number // 2).encode() * 1000  # each content under two addresses
        assert keep(cache, url, content) == len(content)
        assert cache.path(url).read_bytes() == content
