"""Answers that are known already, on disk, so that a killed evaluation or prediction goes on where it was.

In come windows of answers as plain values, each appended as one line when all of it is there; out come, after a new
start, those that were written whole, and the most memory that their processes took. The first line says what the
answers depend on: of other weights, rows or settings none is taken. A half last line is dropped. Knows nothing of
models or rows.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError
from phi3v.plain_json import to_json
from phi3v.whole_files import replace_file

FORM = "phi3v answers 1"
"""Another number where lines have another form, or the same rows would be answered otherwise."""
Window = list[dict[str, Any]]
_logger = logging.getLogger(__name__)


class Journal:
    """A file of windows.

    Attributes:
        path: the file.
        windows: number of a window -> its records, of those that were written.
        memory: the most bytes that a process which wrote them had taken by then.
    Example: `Journal(path, {"weights": "9f2c"}).append(0, [{"text": "A hat."}])` leaves the lines
    {"form": "phi3v answers 1", "weights": "9f2c"} and {"window": 0, "records": [{"text": "A hat."}], "memory": 0}.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, str]) -> None:
        """Opens a journal, or begins it.

        Args:
            path: the file; its folder is there.
            depends_on: what the answers depend on, by name: "weights", "rows", "settings".
        Raises: ConfigError where the file cannot be written.
        """
        self.path = path
        self.windows: dict[int, Window] = {}
        self.memory = 0
        self._head = {"form": FORM, **depends_on}
        head, windows, whole, memory = read_journal(path)
        if head == self._head:
            self.windows, self.memory = windows, memory
            text = path.read_bytes()[:whole]
        else:
            if windows:
                changed = [name for name in self._head if (head or {}).get(name) != self._head[name]]
                _logger.warning("%s holds answers under other %s: starting over", path, " and ".join(changed))
            text = (to_json(self._head) + "\n").encode()
        try:
            replace_file(path, text)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror or error}): name another place") from error

    def append(self, window: int, records: Window, memory: int = 0) -> None:
        """Keeps a window, and the most bytes that its process took so far, and sees it onto the disk."""
        with open(self.path, "ab") as file:
            file.write((to_json({"window": window, "records": records, "memory": memory}) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.windows[window] = records
        self.memory = max(self.memory, memory)

    def remove(self) -> None:
        """Removes the file, whose answers are elsewhere now."""
        self.path.unlink(missing_ok=True)


def read_journal(path: Path) -> tuple[dict[str, Any] | None, dict[int, Window], int, int]:
    """What a journal holds: its first line, its windows, the bytes of them that are whole, and the most memory.

    Reading ends at the first line that is half or no window: what stands behind it was not written by this program.
    """
    try:
        text = path.read_bytes()
    except OSError:
        return None, {}, 0, 0
    head: dict[str, Any] | None = None
    windows: dict[int, Window] = {}
    whole, memory = 0, 0
    for line in text.splitlines(keepends=True):
        try:
            found = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            found = None
        if not isinstance(found, dict) or (head is not None and not isinstance(found.get("window"), int)):
            break
        if head is None:
            head = found
        else:
            windows[found["window"]] = found["records"]
            memory = max(memory, found.get("memory", 0))
        whole += len(line)
    return head, windows, whole, memory
