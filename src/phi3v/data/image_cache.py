"""Downloaded images on disk: content by its own hash, web addresses by theirs.

    objects/ab/cd/abcd...   the bytes of an image, named by their SHA-256
    urls/12/34/1234...      one line of JSON, named by the SHA-256 of the web address:
                            {"bytes": 48213, "object": "abcd..."} or {"failure": "url_gone", "message": "..."}
    tmp/                    what is being written; not there while nobody writes

One file an address and nothing that all share, so any number of processes, also on several machines with a shared file
system, fill one cache without waiting for each other. A file comes to its place complete: written in tmp/, synced,
renamed. A process that is killed leaves files in tmp/ alone, and the next one removes them. Nothing in objects/ or
urls/ depends on when, where or in which order it was written. A file in objects/ that was written to after its address
was noted is taken for good only while its bytes still have its name for a hash. Knows nothing of how images are
downloaded.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.data.scratch import Scratch, file_size, move
from phi3v.errors import DataError


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
        """The complete file of an address; None while it is not cached, or when the file is not what it was."""
        entry, noted = self._entry(url)
        digest, size = entry.get("object"), entry.get("bytes")
        if not isinstance(digest, str) or len(digest) != 64 or not digest.isalnum() or not isinstance(size, int):
            return None
        path = self._place("objects", digest)
        return path if _is_whole(path, size, before=noted) else None

    def failure(self, url: str) -> FetchFailure | None:
        """The lasting failure that is remembered of an address."""
        entry, _ = self._entry(url)
        code, message = entry.get("failure"), entry.get("message")
        return FetchFailure(code, message) if isinstance(code, str) and isinstance(message, str) else None

    @contextmanager
    def writing(self) -> Iterator["CacheWriter"]:
        """A writer with a folder of its own in tmp/, which is gone afterwards; also removes what killed ones left.

        Raises: DataError when there can be no such folder.
        """
        try:
            scratch = Scratch(self.folder / "tmp")
        except OSError as error:
            raise self.unwritable(error) from error
        try:
            yield CacheWriter(self, scratch)
        finally:
            scratch.close()

    def unwritable(self, error: OSError) -> DataError:
        """What a user is told when a file of the cache cannot be written."""
        return DataError(
            f"image cache {self.folder} cannot be written ({error.strerror or error}): free space there, or name "
            "another folder in data.image_cache"
        )

    def _entry(self, url: str) -> tuple[dict[str, Any], int]:
        """What is known of an address, and when it was noted; {} for nothing, or for a file that is no entry."""
        try:
            with open(self._place("urls", url_digest(url)), encoding="utf-8") as file:
                entry, noted = json.load(file), os.fstat(file.fileno()).st_mtime_ns
        except (OSError, ValueError):
            return {}, 0
        return (entry, noted) if isinstance(entry, dict) else ({}, 0)

    def _place(self, kind: str, digest: str) -> Path:
        """Where a file with this hash lies: "objects", "abcd..." -> objects/ab/cd/abcd..."""
        return self.folder / kind / digest[:2] / digest[2:4] / digest


class CacheWriter:
    """Puts images and failures into a cache; may be used by several threads.

    Args:
        cache: the cache.
        scratch: a folder on the same file system, for files that are being written.
    """

    def __init__(self, cache: ImageCache, scratch: Scratch) -> None:
        """Name cache and folder."""
        self.cache = cache
        self._scratch = scratch

    def temporary(self) -> Path:
        """The name of a file to write an image into, for `keep`."""
        return self._scratch.file()

    def keep(self, url: str, file: Path) -> int:
        """Moves a complete file into the cache, as the image of an address. Returns: its size in bytes."""
        with open(file, "rb+") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
            size = written.tell()
            os.fsync(written.fileno())
        place = self.cache._place("objects", digest)
        if not _is_whole(place, size):
            move(file, place)
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
        move(file, self.cache._place("urls", url_digest(url)))


def _is_whole(path: Path, size: int, *, before: int = 0) -> bool:
    """Whether a file of this size still has the bytes that it is named for.

    Args:
        path: the file, named by the SHA-256 of its bytes.
        size: what it must have, in bytes.
        before: a file whose last write was before this time, in ns, is known to be good. Files of the same moment are
            not: a file system may keep time in steps of some ms, or of a second.
    """
    if file_size(path) != size:
        return False
    if path.stat().st_mtime_ns < before:
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == path.name


def url_digest(url: str) -> str:
    """The hash that names an address in the cache, and its shard."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def in_shard(url: str, shard: tuple[int, int]) -> bool:
    """Whether an address belongs to the i-th of n parts: its hash, the first 16 digits, divided by n leaves i."""
    return int(url_digest(url)[:16], 16) % shard[1] == shard[0]
