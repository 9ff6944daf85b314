"""Kept features on disk, one safetensors file each, for all processes and for later runs.

    ab/abcd....safetensors   features `[image tokens, hidden]` under the name abcd..., with that name and the SHA-256 of
                             type, shape and bytes in the header
    size                     bytes of all these files as one decimal number; also the lock of those who add or remove
    tmp/                     what is being written; not there while nobody writes

Files come to their place complete (see `data.scratch`) and are never changed there, so that a reader may map them: what
is read is paid for when it is used. A file is taken for good when safetensors reads it whole and name and digest are
right, which is looked at once a process and file; any other is removed. Beyond the bound the files go first that were
looked at longest ago, never those of the run itself; another process may remove them, and `get` then says None.
"""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phi3v.data.scratch import Scratch, alone, move
from phi3v.features.store import FeatureStore

_TENSOR, _ENDING = "features", ".safetensors"
_HEADER = 512
"""A file is larger than its features by less than so many bytes."""
_SPARE = 16
"""Where files of others have to go, a sixteenth of the bound is made free at once: looking through a folder of 50,000
files takes a tenth of a second, too long to do for each new one."""

Stamp = tuple[int, int, int]
"""Number, size and time of a file: another file at the same place has another stamp."""


class FeatureFolder(FeatureStore):
    """Features in a folder, which is made when something is written.

    Can be pickled for loader workers. A folder that cannot be written to, or a full disk, is `trouble`, not an error:
    what cannot be kept is computed. Where something else has taken a file's own place, that image alone is not kept.

    Attributes:
        folder: where they lie.
    """

    kind = "disk"

    def __init__(self, limit_bytes: int, folder: str | Path | None = None) -> None:
        """Name the folder; None for phi3v/features in the user's cache folder."""
        super().__init__(limit_bytes)
        self.folder = (Path(folder) if folder is not None else default_folder()).absolute()
        self._good: dict[str, Stamp] = {}

    def begin(self) -> None:
        """See `FeatureStore`; a folder that is larger than the bound is brought within it."""
        super().begin()
        if self.folder.is_dir():
            with suppress(OSError), alone(self.folder / "size") as lock:  # `put` will say what is wrong with it
                self._make_room(lock, 0)

    def fits(self, size: int) -> bool:
        """See `FeatureStore`; counts the header of the file too."""
        return super().fits(size + _HEADER)

    def hold(self, name: str) -> bool:
        """See `FeatureStore`; looks at the file, and makes it the last to be removed."""
        if name in self._held:
            return True
        path = self._path(name)
        if self.get(name) is None or self.held_bytes + (size := path_size(path)) > self.limit_bytes:
            return False  # that the folder cannot be written to does not matter here
        with suppress(OSError):  # another process removed it, or it is not ours to touch
            times = os.stat(path)
            os.utime(path, ns=(time.time_ns(), times.st_mtime_ns))
        self._held[name] = size
        return True

    def get(self, name: str) -> torch.Tensor | None:
        """See `FeatureStore`; the tensor is a view of the file, in pages that are read as they are used."""
        path = self._path(name)
        try:
            before = stamp_of(path)
            with safe_open(path, framework="pt") as file:
                header, features = file.metadata() or {}, file.get_tensor(_TENSOR)
        except OSError:  # not there, or not to be read just now
            return None
        except SafetensorError:
            self._remove(path)
            return None
        if self._good.get(name) != before:
            if header.get("name") != name or header.get("sha256") != digest_of(features):
                self._remove(path)
                return None
            self._good[name] = before
        return features

    def put(self, name: str, features: torch.Tensor) -> bool:
        """See `FeatureStore`."""
        if self.hold(name):
            return True
        if not self.fits(features.nbytes):
            return False
        try:
            return self._write(name, features.contiguous())
        except OSError as error:
            place = self._path(name)
            self.ended = not (place.is_dir() or place.parent.is_file())
            self.trouble = f"{self.folder if self.ended else place} cannot be written ({error.strerror or error})"
        except SafetensorError as error:  # what it makes of a full disk
            self.trouble, self.ended = f"{self.folder} cannot be written ({str(error).splitlines()[0]})", True
        return False

    def _write(self, name: str, features: torch.Tensor) -> bool:
        """A new file, written aside and moved to its place once there is room for it."""
        scratch = Scratch(self.folder / "tmp")
        try:
            file = scratch.file()
            save_file({_TENSOR: features}, file, metadata={"name": name, "sha256": digest_of(features)})
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
            size, place = path_size(file), self._path(name)
            with alone(self.folder / "size") as lock:
                if path_size(place) != size:  # else another process was faster
                    if not self._make_room(lock, size):
                        return False
                    move(file, place)
            self._held[name] = size
            with suppress(FileNotFoundError):  # another process has removed it already
                self._good[name] = stamp_of(place)
            return True
        finally:
            scratch.close()

    def _make_room(self, lock: int, size: int) -> bool:
        """Notes so many bytes more in `size`, old files removed where that is needed; False where they do not fit.

        The number is written before a file is moved or removed: killed in between, it says too much, and the next one
        who finds it beyond the bound counts again.
        """
        total = _read_number(lock)
        if total is None or total + size > self.limit_bytes:
            total = self._remove_oldest(self.limit_bytes - size)
        if total + size > self.limit_bytes:
            _write_number(lock, total)
            return False
        _write_number(lock, total + size)
        return True

    def _remove_oldest(self, wanted: int) -> int:
        """Counts all files, and removes old ones until they take at most `wanted` bytes, or none but ours is left.

        Returns: what is left in bytes.
        """
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        if total <= wanted:
            return total
        goal = wanted - self.limit_bytes // _SPARE
        for _, size, path in files:
            if total <= goal:
                break
            if path.name.removesuffix(_ENDING) not in self._held:
                with suppress(OSError):
                    path.unlink()
                    total -= size
        return total

    def _files(self) -> list[tuple[int, int, Path]]:
        """All kept files: when they were looked at, their size, their place."""
        found = []
        for shard in [entry.path for entry in os.scandir(self.folder) if len(entry.name) == 2 and entry.is_dir()]:
            for entry in os.scandir(shard):
                with suppress(FileNotFoundError):  # another process has removed it as damaged
                    seen = entry.stat()
                    if entry.is_file():
                        found.append((seen.st_atime_ns, seen.st_size, Path(entry.path)))
        return found

    def _remove(self, path: Path) -> None:
        """Removes a damaged file; `size` says too much then, and is counted again when that matters."""
        with suppress(OSError):
            path.unlink()

    def _path(self, name: str) -> Path:
        """Where features lie: "abcd..." -> ab/abcd....safetensors."""
        return self.folder / name[:2] / f"{name}{_ENDING}"


def default_folder() -> Path:
    """Where features are kept when nobody says: $XDG_CACHE_HOME/phi3v/features, else ~/.cache/phi3v/features."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3v" / "features"


def digest_of(features: torch.Tensor) -> str:
    """SHA-256 of a tensor on the CPU: its type, its shape and its bytes."""
    found = hashlib.sha256(f"{features.dtype} {list(features.shape)} ".encode())
    found.update(features.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def path_size(path: Path) -> int:
    """Size of a file in bytes, 0 when it is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file. Raises: FileNotFoundError."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_number(file: int) -> int | None:
    """The number in an open file: b"1234\\n" -> 1234; None for anything else."""
    text = os.pread(file, 32, 0)
    return int(text) if text.strip().isdigit() else None


def _write_number(file: int, number: int) -> None:
    """Writes a number, in one call and always as long: 1234 -> 20 digits and a newline."""
    os.pwrite(file, f"{max(number, 0):020d}\n".encode(), 0)
