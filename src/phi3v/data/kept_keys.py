"""What ties rows to each other, kept for many rows: some ninety bytes a row where lists of texts take three hundred.

In come the keys of rows (`cells.group_keys`), one row after the other; out come these keys again. Knows nothing of what
is in them.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import overload


class KeptKeys(Sequence[list[str]]):
    """The keys of rows, a list for each.

    Example: KeptKeys([["a"], ["b", "c"]])[1] is ["b", "c"].
    """

    def __init__(self, keys: Iterable[Sequence[str]] = ()) -> None:
        """Begin with the keys of some rows."""
        self._text = bytearray()
        self._ends = array("q", [0])  # of each key in the bytes
        self._rows = array("q", [0])  # of each row in the ends
        for row_keys in keys:
            self.add(row_keys)

    def add(self, keys: Sequence[str]) -> None:
        """Keep the keys of the next row."""
        for key in keys:
            self._text += key.encode("utf-8", "surrogatepass")
            self._ends.append(len(self._text))
        self._rows.append(len(self._ends) - 1)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows) - 1

    @overload
    def __getitem__(self, index: int) -> list[str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[str]]: ...
    def __getitem__(self, index: int | slice) -> list[str] | list[list[str]]:
        """The keys of a row, or of each row of a slice."""
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        places = range(self._rows[index], self._rows[index + 1])
        texts = (self._text[self._ends[place] : self._ends[place + 1]] for place in places)
        return [text.decode("utf-8", "surrogatepass") for text in texts]
