"""Webdataset shards as a table: the members of a sample, files that share a name up to its first dot, are its columns.

In come paths of .tar files; out come records by number, read where they lie: nothing is unpacked or copied, so member
names lead nowhere, and links, devices and sparse files are passed over, as are members without an ending (`not_read`).
An image member, by its ending or its content, is the column `image` (a list where a sample has several), a text member
its ending (`txt`), and the keys of a JSON member are `json.KEY`. What img2dataset writes is of this form. Members of a
sample stand side by side; where they do not, what a record lacks is `Unread`, which says so.

Example: a shard with 000.jpg, 000.txt and 000.json, which holds {"url": "https://a.example/x.jpg", "width": 640} -> the
record {"__key__": "000", "image": {"bytes": ..., "path": "shard.tar/000.jpg"}, "txt": "a scarf", "json.url":
"https://a.example/x.jpg", "json.width": 640}.
"""

import json
import os
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from phi3v.data.images import begins_as_image
from phi3v.data.json_text import RepeatedKeyError, parse_json
from phi3v.data.not_read import NotRead
from phi3v.data.record_table import RecordTable
from phi3v.data.templates import Unread
from phi3v.errors import DataError

_TEXTS = ("json", "txt")
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_MAX_MEMBER_BYTES = 256 * 2**20
_SAMPLES_FOR_COLUMNS = 100
_BLOCK = 512
_READ_AT_ONCE = 2**20
_NAMED = 20  # members of a shard that are not read and are named one by one
_MADE = ("__key__", "image")  # columns that are made here


class _SizedMember(tarfile.TarInfo):
    """A member whose size is looked at before it is believed: tarfile would seek, or ask for memory, by it."""

    def _proc_member(self, tar: Any) -> Any:  # where tarfile lets a subclass in before it reads data
        """The member, as tarfile makes it. Raises: ReadError for a size that leads out of the file."""
        if not (self.isdir() or self.islnk() or self.issym() or self.isdev()):
            _check_size(self, tar.fileobj.tell(), tar)
        return super()._proc_member(tar)  # type: ignore[misc]


def _check_size(member: tarfile.TarInfo, start: int, tar: Any) -> None:
    """Raises: ReadError for a member of a size that its shard cannot hold behind `start`."""
    follow = max(os.fstat(tar.fileobj.fileno()).st_size - start, 0)
    if not 0 <= member.size <= follow:
        raise tarfile.ReadError(
            f"the header of its member {member.name[:120]!r} says {member.size} bytes, and {follow} follow"
        )


class TarTable(RecordTable):
    """Records of some shards; about 100 bytes a sample are kept in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads the headers of all members. Raises: DataError in one line for a shard that is cut off or no tar."""
        super().__init__(paths)
        self._first = array("Q")  # of each sample: its first entry in the arrays below
        self._offsets = array("Q")
        self._sizes = array("Q")
        self._endings: list[str] = []
        self._names: list[str] = []
        self._apart: dict[int, int] = {}  # samples of a shard with one name -> another of that name
        self.not_read: list[NotRead] = []
        self.column_names = []
        for path in paths:
            self._firsts.append(len(self._names))
            self._index(path)
        if not self._names:
            raise DataError(f"data set {', '.join(self._paths)} cannot be read: it has no rows")
        self._first.append(len(self._offsets))
        self.column_names = self._columns()

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._names)

    def _read(self, number: int, file: BinaryIO) -> dict[str, Any]:
        """The record of a sample; cells of a member that does not read, or is there twice, are `Unread`."""
        record: dict[str, Any] = {"__key__": self._names[number]}
        made: dict[str, str] = {}  # column -> the member that it is from
        images: list[Any] = []
        shard = Path(self._paths[self._file_of(number)]).name
        entries = range(self._first[number], self._first[number + 1])
        endings = [self._endings[entry] for entry in entries]
        for entry, ending in zip(entries, endings, strict=True):
            member, size = f"{self._names[number]}.{ending}", self._sizes[entry]
            file.seek(self._offsets[entry])
            data = file.read(size) if size <= _MAX_MEMBER_BYTES else b""
            kind = ending.rpartition(".")[2]
            unread = None
            if endings.count(ending) > 1:
                unread = Unread(f"is in {member}, which its shard holds twice")
            elif size > _MAX_MEMBER_BYTES:
                unread = Unread(f"is in {member}, which has {size} bytes, and {_MAX_MEMBER_BYTES} may be read")
            if kind in _IMAGES or (kind not in _TEXTS and begins_as_image(data[:16])):
                images.append(unread or {"bytes": data, "path": f"{shard}/{member}"})
            elif kind == "json":
                found = unread or _json(data, member)
                if isinstance(found, Unread):  # which keys it should have is known from other samples
                    told = {name: found for name in self.column_names if name.startswith(f"{ending}.")}
                else:
                    told = {f"{ending}.{key}": value for key, value in found.items()}
                for name, value in told.items():
                    _set(record, made, name, member, value)
            elif ending not in _MADE:
                _set(record, made, ending, member, unread or _text(data, member))
        record["image"] = images if len(images) > 1 else images[0] if images else None
        if number in self._apart:
            lost = Unread(f"is in another place of the shard: {self._apart_line(number)}")
            record |= {name: lost for name in self.column_names if record.get(name) is None and self._has(number, name)}
        return record

    def _has(self, number: int, column: str) -> bool:
        """Whether the other sample of the same name has the member of a column."""
        other = self._apart[number]
        for ending in self._endings[self._first[other] : self._first[other + 1]]:
            kind = ending.rpartition(".")[2]
            if column == ("image" if kind in _IMAGES else ending) or (
                kind == "json" and column.startswith(f"{ending}.")
            ):
                return True
        return False

    def _apart_line(self, number: int) -> str:
        """What is wrong with a sample whose members stand in several places, and the way out."""
        return (
            f"members of {self._names[number][:120]!r} have others between them: pack it again with the members of a "
            "row side by side (tar --sort=name)"
        )

    @property
    def column_hint(self) -> str:
        """Why a column may not be there: members apart, or rows behind those that were looked at; "" for neither."""
        if self._apart:
            return self._apart_line(min(self._apart))
        if len(self) > _SAMPLES_FOR_COLUMNS:
            known = f"columns of shards are those of their first {_SAMPLES_FOR_COLUMNS} rows"
            return f"{known}: put a row that has it among them"
        return ""

    def _index(self, path: Path) -> None:
        """Notes where the members of one shard lie."""
        before, passed, hidden = "", 0, Counter[str]()
        known: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:", tarinfo=_SizedMember) as tar:
                for member in tar:
                    if member.isreg():  # a pax header may have said another size
                        _check_size(member, member.offset_data, tar)
                    folder, _, name = member.name.rpartition("/")
                    key, dot, ending = name.partition(".")
                    if not member.isreg() or member.issparse() or not dot or not key:
                        passed += not member.isdir()
                        if passed <= _NAMED and not member.isdir():
                            self.not_read.append(_passed_over(path, member))
                        continue
                    key, ending = f"{folder}/{key}" if folder else key, sys.intern(ending.lower())
                    if ending in _MADE and not begins_as_image(_begin(tar, member)):
                        hidden[ending] += 1
                    if key != before:
                        before = key
                        number = len(self._names)
                        if (other := known.setdefault(key, number)) != number:
                            self._apart |= {number: other, other: number}
                        self._first.append(len(self._offsets))
                        self._names.append(key)
                    self._offsets.append(member.offset_data)
                    self._sizes.append(member.size)
                    self._endings.append(ending)
                end = tar.offset
            if passed > _NAMED:
                self.not_read.append(
                    NotRead(f"more members of {path}", "as those that are named", files=passed - _NAMED)
                )
            for ending, count in hidden.items():
                told = f"no image by its content, and its name is that of the column {ending!r}, which is made here"
                self.not_read.append(NotRead(f"{path}/*.{ending}", f"{told}: give it another ending", files=count))
            self._check_end(path, end)
        except DataError:
            raise
        except RecursionError as error:  # tarfile reads such a header within the one before
            raise DataError(
                f"shard {path} is damaged: its headers are nothing but long names: copy it again"
            ) from error
        except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
            last = f" after {before}" if before else ""
            raise DataError(f"shard {path} is damaged{last} ({error}): copy it again") from error

    def _check_end(self, path: Path, end: int) -> None:
        """Behind the last member stand zeros and nothing else; a header that is none ends the reading without an error.

        Raises: ReadError for a shard without an end, DataError for one with something behind it.
        """
        with open(path, "rb") as file:
            file.seek(end)
            block = file.read(_BLOCK)
            if len(block) < _BLOCK:
                raise tarfile.ReadError(f"it ends at byte {end} without the zeros that end a shard")
            if any(block):
                raise tarfile.ReadError(f"no header at byte {end}")
            while block := file.read(_READ_AT_ONCE):
                if block.count(0) < len(block):
                    raise DataError(
                        f"shard {path} goes on behind its end at byte {end}, as joined shards do: keep shards as files "
                        "of their own, or pack the members into a new one"
                    )

    def _columns(self) -> list[str]:
        """The columns of the first hundred samples."""
        names = {name: None for number in range(min(len(self), _SAMPLES_FOR_COLUMNS)) for name in self[number]}
        return list(names)


def _set(record: dict[str, Any], made: dict[str, str], name: str, member: str, value: Any) -> None:
    """A cell of a record; `Unread` where two members give it: a text member 0.json.width, and 0.json with a "width"."""
    if made.get(name, member) != member:
        value = Unread(f"is in {made[name]} and in {member}: rename one of them")
    record[name], made[name] = value, member


def _begin(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The first bytes of a member."""
    file = tar.extractfile(member)
    return file.read(16) if file is not None else b""


def _passed_over(path: Path, member: tarfile.TarInfo) -> NotRead:
    """A member that is of no sample: "a.tar/readme", "its name has no ending, or nothing before it"."""
    reason = "its name has no ending, or nothing before it"
    if not member.isreg() or member.issparse():
        reason = "a link, a device or a sparse file, which leads out of the shard or is not all there"
    return NotRead(f"{path}/{member.name[:120]}", reason)


def _text(data: bytes, member: str) -> str | Unread:
    """A text member without the line break that ends a text file: b"a scarf\\n" -> "a scarf". Others stay."""
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        return Unread(f"is in {member}, which is not UTF-8 text")


def _json(data: bytes, member: str) -> dict[str, Any] | Unread:
    """The keys of a JSON member.

    Example: `{"width": 640}` -> {"width": 640}; `{` -> Unread("is in 0.json, which is not JSON (Expecting property name
    enclosed in double quotes, line 1, column 2)").
    """
    try:
        value = parse_json(data)
    except UnicodeDecodeError:
        return Unread(f"is in {member}, which is not UTF-8 text")
    except json.JSONDecodeError as error:
        return Unread(f"is in {member}, which is not JSON ({error.msg}, line {error.lineno}, column {error.colno})")
    except RepeatedKeyError as error:
        return Unread(f"is in {member}, in which {error}")
    except (ValueError, RecursionError):
        return Unread(f"is in {member}, which does not read as JSON")
    return value if isinstance(value, dict) else Unread(f"is in {member}, which holds no mapping")
