"""Downloaded images on disk: content by its own hash, web addresses by theirs.

    objects/ab/cd/abcd...   the bytes of an image, named by their SHA-256
    urls/12/34/1234...      one line of JSON, named by the SHA-256 of the web address:
                            {"bytes": 48213, "object": "abcd..."} or {"failure": "url_gone", "message": "..."}
    tmp/                    what is being written; not there while nobody writes

One file an address and nothing that all share, so any number of processes, also on several machines with a shared file
system, fill one cache without waiting for each other. A file comes to its place complete: written in tmp/, synced,
renamed. A process that is killed leaves files in tmp/ alone, and the next one removes them. Nothing in objects/ or
urls/ depends on when, where or in which order it was written. Knows nothing of how images are downloaded.
"""

import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.errors import DataError

_STALE_SECONDS = 24 * 3600.0
"""How long a folder in tmp/ was not touched that is removed although its lock says nothing: another machine's, because
file systems keep some locks to one machine, or any on a file system without locks."""
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class FetchFailure:
    """Why there is no image behind an address.

    Attributes:
        reason_code: one word for machines, "url_not_found" for instance.
        message: one line for people; holds the address without its query.
    """

    reason_code: str
    message: str


@dataclass(frozen=True)
class ImageCache:
    """The images of web addresses, in a folder that is made when something is written.

    Example: ImageCache(Path("cache")).path("https://shop.example/a.jpg") -> Path("cache/objects/ab/cd/abcd...")

    Attributes:
        folder: where the cache lies.
    """

    folder: Path

    def path(self, url: str) -> Path | None:
        """The complete file of an address; None while it is not cached, or when the file has lost its size."""
        entry = self._entry(url)
        digest, size = entry.get("object"), entry.get("bytes")
        if not isinstance(digest, str) or len(digest) != 64 or not digest.isalnum():
            return None
        path = self._place("objects", digest)
        return path if _size(path) == size else None

    def failure(self, url: str) -> FetchFailure | None:
        """The lasting failure that is remembered of an address."""
        entry = self._entry(url)
        code, message = entry.get("failure"), entry.get("message")
        return FetchFailure(code, message) if isinstance(code, str) and isinstance(message, str) else None

    @contextmanager
    def writing(self) -> Iterator["CacheWriter"]:
        """A writer with a folder of its own in tmp/, which is gone afterwards; also removes what killed ones left.

        Raises: DataError when there can be no such folder.
        """
        temporary = self.folder / "tmp"
        try:
            _remove_abandoned(temporary)
            own, lock = _own_folder(temporary)
        except OSError as error:
            raise self.unwritable(error) from error
        try:
            yield CacheWriter(self, own)
        finally:
            _remove(own)
            os.close(lock)
            _remove_abandoned(temporary)

    def unwritable(self, error: OSError) -> DataError:
        """What a user is told when a file of the cache cannot be written."""
        return DataError(
            f"image cache {self.folder} cannot be written ({error.strerror or error}): free space there, or name "
            "another folder in data.image_cache"
        )

    def _entry(self, url: str) -> dict[str, Any]:
        """What is known of an address; {} for nothing, or for a file that is no entry."""
        try:
            entry = json.loads(self._place("urls", url_digest(url)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return entry if isinstance(entry, dict) else {}

    def _place(self, kind: str, digest: str) -> Path:
        """Where a file with this hash lies: "objects", "abcd..." -> objects/ab/cd/abcd..."""
        return self.folder / kind / digest[:2] / digest[2:4] / digest


class CacheWriter:
    """Puts images and failures into a cache; may be used by several threads.

    Args:
        cache: the cache.
        folder: an empty folder on the same file system, for files that are being written.
    """

    def __init__(self, cache: ImageCache, folder: Path) -> None:
        """Name cache and folder."""
        self.cache = cache
        self._folder = folder

    def temporary(self) -> Path:
        """The name of a file to write an image into, for `keep`."""
        return self._folder / uuid.uuid4().hex

    def keep(self, url: str, file: Path) -> int:
        """Moves a complete file into the cache, as the image of an address. Returns: its size in bytes."""
        with open(file, "rb+") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
            size = written.tell()
            os.fsync(written.fileno())
        place = self.cache._place("objects", digest)
        if _size(place) != size:
            _move(file, place)
        self._write_entry(url, {"bytes": size, "object": digest})
        return size

    def remember(self, url: str, failure: FetchFailure) -> None:
        """Notes that an address has no image and need not be asked again."""
        self._write_entry(url, {"failure": failure.reason_code, "message": failure.message})

    def _write_entry(self, url: str, entry: dict[str, Any]) -> None:
        """One line of JSON, in the same bytes each time."""
        file = self.temporary()
        with open(file, "w", encoding="utf-8") as written:
            written.write(json.dumps(entry, sort_keys=True) + "\n")
            written.flush()
            os.fsync(written.fileno())
        _move(file, self.cache._place("urls", url_digest(url)))


def url_digest(url: str) -> str:
    """The hash that names an address in the cache, and its shard."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def _move(file: Path, place: Path) -> None:
    """A file to its place, in one step."""
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, place)


def _size(path: Path) -> int | None:
    """Size of a regular file; None when there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _own_folder(temporary: Path) -> tuple[Path, int]:
    """A new folder in tmp/, and the open lock that shows that its process lives.

    The lock ends with the process, however it ends. Another process may remove the folder in the moment between its
    making and its locking; then a new one is made.
    """
    while True:
        own = temporary / f"{_machine()}-{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):  # tmp/ or the folder was removed by another process
            own.mkdir(parents=True)
            lock = os.open(own / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
            if _locked(lock) is not False and (own / _LOCK).exists():
                return own, lock
            os.close(lock)


def _machine() -> str:
    """What this machine's folders in tmp/ begin with."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def _locked(lock: int) -> bool | None:
    """Takes a lock; False when another holds it, None when the file system, or Windows, has no locks of this kind."""
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError):
        return None
    return True


def _remove_abandoned(temporary: Path) -> None:
    """Removes the folders in tmp/ whose process is gone, then tmp/ when it is empty."""
    try:
        names = os.listdir(temporary)
    except FileNotFoundError:
        return
    for name in names:
        with suppress(OSError):  # another process does the same
            _remove_if_abandoned(temporary / name)
    with suppress(OSError):
        temporary.rmdir()


def _remove_if_abandoned(own: Path) -> None:
    """Removes a folder in tmp/ whose lock is free; where locks say nothing, one that nobody touched for a day."""
    old = time.time() - own.stat().st_mtime > _STALE_SECONDS
    try:
        lock = os.open(own / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        if old:
            _remove(own)
        own.rmdir()  # of a process that was killed before it had a lock; fails where there are files
        return
    try:
        taken = _locked(lock)
        if (taken and own.name.startswith(_machine())) or (taken is not False and old):
            _remove(own)
    finally:
        os.close(lock)


def _remove(own: Path) -> None:
    """Removes a folder in tmp/, the lock last: killed in between, what is left is still seen as abandoned."""
    with suppress(OSError):
        for file in sorted(own.iterdir(), key=lambda file: file.name == _LOCK):
            file.unlink()
        own.rmdir()
