"""What a decoder would spend out of all proportion on a file, seen before it does.

In come open files and headers, out come files that stop a decoder, and ValueError with the reason. A pixel cap alone
leaves ways to make a small picture cost minutes or gigabytes; the limits here close those that PIL leaves open:

| what a file may hold | limit |
|---|---|
| bytes | 8 for each allowed pixel, and 16 MB for everything else (176 MB at 20 million pixels) |
| pieces: chunks, segments, blocks, all that a decoder reads one by one | 200,000 reads |
| bytes in front of a JPEG's pixels | 8 MB |
| bytes of a JPEG's EXIF block, all segments | 1 MB |
| scans of a JPEG | 1,000, and scans x pixels up to a thousand million (50 scans of 20 million pixels) |
| strips or tiles of a TIFF | 100,000 |
| pixels of one TIFF tile | the pixel cap |
| bytes that the tags of a TIFF, of EXIF or of an MPO's index name | those of the file or block, and 1 MB |

An EXIF block beyond the last limit is passed over where PIL has not read it when the file is open (PNG, WebP).
PIL's own limits hold beside them: 1 MB for a compressed text or profile of a PNG, 64 MB for all its texts, bands and
strips of a TIFF. Knows nothing of pixels, rows or paths.
"""

import io
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

MAX_READS = 200_000
MAX_JPEG_HEADER = 8_000_000
MAX_JPEG_EXIF = 1_000_000
MAX_SCANS = 1_000
MAX_SCANNED_PIXELS = 1_000_000_000
MAX_STRIPS = 100_000
_OTHER_BYTES = 16_000_000
_BYTES_A_PIXEL = 8  # four channels of 16 bits
_SPARE_TAG_BYTES = 1_000_000

_STRIPS_AND_TILES = (273, 279, 324, 325)  # StripOffsets, StripByteCounts, TileOffsets, TileByteCounts
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_WHOLE_NUMBERS = {3: "H", 4: "L", 16: "Q"}  # TIFF's SHORT, LONG, LONG8
_TAG_SIZES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 0])
"""Bytes of one value of TIFF's types 1 to 16; 0 for those that no reader knows."""
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A JPEG marker that ends entropy-coded data: neither a stuffed byte, nor a restart, nor a fill byte."""


class _Metered:
    """Counts the reads of a file, and the bytes read while there is an allowance."""

    _plain_read: Callable[..., bytes]
    reads = 0
    allowance: int | None = None
    exif = b""

    def read(self, size: int | None = -1, /) -> bytes:
        """As the file's own. Raises: ValueError beyond the limits."""
        data: bytes = self._plain_read(size)
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError(f"it is made of so many pieces that reading them takes over {MAX_READS} steps")
        if self.allowance is not None:
            self.allowance -= len(data)
            if self.allowance < 0:
                raise ValueError(f"it holds more than {MAX_JPEG_HEADER} bytes in front of its pixels")
            if data[:4] == b"Exif":  # PIL joins the segments and reads their tags while it opens the file
                self.exif += data[6:]
                if len(self.exif) > MAX_JPEG_EXIF:
                    raise ValueError(f"its EXIF block has more than {MAX_JPEG_EXIF} bytes")
                check_exif(self.exif)
            elif data[:4] == b"MPF\0":
                check_exif(data[4:])
        return data


class MeteredBytes(_Metered, io.BytesIO):
    """The bytes of an encoded image as a file whose reads are counted."""

    _plain_read = io.BytesIO.read  # `super().read` would cost a third more, forty times for each JPEG


class MeteredFile(_Metered, io.BufferedReader):
    """An open image file whose reads are counted."""

    _plain_read = io.BufferedReader.read


def check_size(size: int, max_pixels: int) -> None:
    """Raises: ValueError for an empty file, and for one of more bytes than images of `max_pixels` need.

    Example: with 20,000,000 pixels up to 176,000,000 bytes are read.
    """
    limit = max_pixels * _BYTES_A_PIXEL + _OTHER_BYTES
    if size == 0:
        raise ValueError("it is empty")
    if size > limit:
        raise ValueError(f"its {size} bytes are more than the {limit} that image.max_pixels: {max_pixels} allows")


def begin_header(file: MeteredBytes | MeteredFile, max_pixels: int) -> None:
    """Looks at the first bytes of a file before a decoder does, and limits what the decoder may read of the header.

    Raises: ValueError for a TIFF with too many strips or too large tiles.
    """
    start = file.read(16)
    if start.startswith(b"\xff\xd8"):
        file.allowance = MAX_JPEG_HEADER
    elif start[:2] in (b"II", b"MM"):
        _check_tiff(file, start, max_pixels)
    file.seek(0)


def end_header(file: MeteredBytes | MeteredFile) -> None:
    """Lifts the limit on bytes that holds for the header."""
    file.allowance = None


def check_scans(file: MeteredBytes | MeteredFile, pixels: int) -> None:
    """Raises: ValueError for a JPEG whose scans, each of which goes over the whole picture, are too many.

    Example: the 10 scans of an ordinary progressive JPEG are few; 1,000 empty ones in 150 kB take 20 seconds.
    """
    file.seek(0)
    data, place, scans, components = file.read(), 2, 0, 0
    while (match := _MARKER.search(data, place)) is not None:
        marker, place = data[match.start() + 1], match.end()
        if marker == 0xD9:  # end of image; what follows is another picture or none
            return
        if marker in (0xC0, 0xC1):  # a sequential frame: length, precision, height, width, number of components
            components = int.from_bytes(data[place + 7 : place + 8], "big")
        if marker == 0xDA:  # a scan: length, number of components
            scans += 1
            if scans == 1 and components and data[place + 2 : place + 3] == bytes([components]):
                return  # all components in one scan: the decoder stops behind it
            if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
                raise ValueError(f"its pixels are spread over {scans} scans or more")
        if marker != 0x01:  # all but TEM have a length
            place += int.from_bytes(data[place : place + 2], "big")


def find_exif(info: dict[str | tuple[int, int], Any], file: MeteredBytes | MeteredFile, *, png: bool) -> None:
    """Has what PIL knows of an opened image hold its EXIF block, which may stand behind the pixels of a PNG.

    PIL would find it there only by decoding them.

    Raises: ValueError for a block that PIL had better not read, see `check_exif`.
    """
    if png and "exif" not in info and (block := _late_exif(file)):
        info["exif"] = block
    if (found := info.get("exif")) is None and "Raw profile type exif" in info:
        found = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
    if found is not None:
        check_exif(found)


def _late_exif(file: MeteredBytes | MeteredFile) -> bytes | None:
    """The EXIF block of a PNG wherever it stands, its pixels passed over; None when there is none."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"eXIf":
            return file.read(length)
        if kind == b"IEND":
            break
        file.seek(length + 4, io.SEEK_CUR)  # its check sum too
    return None


def check_exif(block: bytes) -> None:
    """Looks at the first directory of an EXIF block; PIL below 13 reads all that its tags name, over and over.

    Example: 60,000 tags that name the same 100 kB are 6 GB.

    Raises: ValueError where they name far more bytes than the block has.
    """
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    if (found := _directory(io.BytesIO(block), block[:16])) is not None:
        _check_tags(*found, len(block))


def _check_tags(entry: str, directory: bytes, length: int) -> None:
    """Raises: ValueError for a directory that names more than `length` bytes and the spare ones.

    A tag counts up to `length`: a block that was cut off may name more than is left of it.
    """
    order, number, value = entry[0], *(("u8", "V8") if "Q" in entry else ("u4", "V4"))
    form = np.dtype([("tag", order + "u2"), ("kind", order + "u2"), ("number", order + number), ("value", value)])
    entries = np.frombuffer(directory, form)
    values = np.minimum(entries["number"], length).astype(np.int64)
    sizes = values * _TAG_SIZES[np.minimum(entries["kind"], len(_TAG_SIZES) - 1)]
    named = int(np.minimum(sizes, length).sum())
    if named > length + _SPARE_TAG_BYTES:
        raise ValueError(f"its tags name {named} bytes, far more than the {length} that hold them")


def _directory(file: io.BufferedIOBase, start: bytes) -> tuple[str, bytes] | None:
    """The form of an entry and the entries of the first directory of a TIFF, as PIL finds it; None of a broken one."""
    order = "<" if start[:2] == b"II" else ">"
    big = start[2:3] == b"\x2b"
    place, count, entry = ("8Q", "Q", "HHQ8s") if big else ("4L", "H", "HHL4s")
    try:
        (offset,) = struct.unpack_from(order + place[1], start, int(place[0]))
        file.seek(offset)
        (entries,) = struct.unpack(order + count, file.read(struct.calcsize(order + count)))
        size = struct.calcsize(order + entry)
        directory = file.read(size * min(entries, 65536))
    except (struct.error, ValueError, OverflowError):
        return None
    return order + entry, directory[: len(directory) // size * size]


def _check_tiff(file: MeteredBytes | MeteredFile, start: bytes, max_pixels: int) -> None:
    """Looks at the first directory of a TIFF. A broken one is left to PIL, which refuses it."""
    if (found := _directory(file, start)) is None:
        return
    entry, directory = found
    tile = {_TILE_WIDTH: 1, _TILE_LENGTH: 1}
    for tag, kind, number, value in struct.iter_unpack(entry, directory):
        if tag in _STRIPS_AND_TILES and number > MAX_STRIPS:
            raise ValueError(f"it is cut into {number} strips or tiles, more than {MAX_STRIPS}")
        if tag in tile and kind in _WHOLE_NUMBERS:
            tile[tag] = max(tile[tag], struct.unpack_from(entry[0] + _WHOLE_NUMBERS[kind], value)[0])
    if tile[_TILE_WIDTH] * tile[_TILE_LENGTH] > max_pixels:
        raise ValueError(
            f"its tiles have {tile[_TILE_WIDTH]}x{tile[_TILE_LENGTH]} pixels, more than the limit of {max_pixels}"
        )
    _check_tags(entry, directory, file.seek(0, io.SEEK_END))


def reason_of(error: BaseException, max_pixels: int) -> str:
    """Why an image cannot be opened, as part of a line, at most 200 characters.

    Pillow has a limit of pixels too, a large one, whose words speak of attacks.
    """
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than the limit of {min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))}"
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return text[:200]
