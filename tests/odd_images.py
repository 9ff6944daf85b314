"""Image files that nobody would take a photo of: small ones of odd kinds, and ones made to stop a decoder.

`odd_images()` are files to accept, with the size that they have upright; `costly_images()` are files that without
limits take seconds, minutes or gigabytes. All are made in memory, the same each time.
"""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, before: bytes = b"", after: bytes = b"", pixels: bytes | None = None) -> bytes:
    """A black grey PNG with chunks before and after its pixels, or with other pixel chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(width + 1) * height, 9)) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")


def tiff(width: int, height: int, compression: int, payload: bytes, more: dict[int, list[int]]) -> bytes:
    """A grey TIFF of one directory; `more` are its other tags, all LONG, in which -1 stands for the payload's place."""
    tags = {256: [width], 257: [height], 258: [8], 259: [compression], 262: [1], 277: [1], **more}
    start = 8 + 2 + 12 * len(tags) + 4
    size = sum(4 * len(values) for values in tags.values() if len(values) > 1)
    directory, tables = struct.pack("<H", len(tags)), b""
    for tag, values in sorted(tags.items()):
        data = struct.pack(f"<{len(values)}L", *[start + size if value == -1 else value for value in values])
        directory += struct.pack("<HHL", tag, 4, len(values))
        directory += data if len(values) == 1 else struct.pack("<L", start + len(tables))
        tables += data if len(values) > 1 else b""
    return b"II*\0" + struct.pack("<L", 8) + directory + bytes(4) + tables + payload


def turned_png() -> bytes:
    """A 6x4 PNG whose EXIF block, orientation 6, stands behind its pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(6, 4, after=chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))


def odd_images() -> dict[str, tuple[bytes, tuple[int, int]]]:
    """Name -> (file, upright size) of small images that are odd and sound."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    files = {
        f"{width}x{height}.{kind.lower()}": (encoded(noise.resize((width, height)), kind), (width, height))
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
        for width, height in ((1, 1), (1, 40), (40, 1), (3, 5))
    }
    jpeg = encoded(noise, "JPEG")
    grey = noise.convert("L")
    files |= {
        "progressive.jpg": (encoded(noise, "JPEG", progressive=True), (40, 30)),
        "cmyk.jpg": (encoded(noise.convert("CMYK"), "JPEG"), (40, 30)),
        "grey.jpg": (encoded(grey, "JPEG"), (40, 30)),
        "bytes behind.jpg": (jpeg + b"\xff" * 1000, (40, 30)),
        "two pictures.mpo": (encoded(noise, "MPO", save_all=True, append_images=[grey.convert("RGB")]), (40, 30)),
        "interlaced alpha.png": (encoded(noise.convert("RGBA"), "PNG", optimize=True), (40, 30)),
        "one bit.png": (encoded(noise.convert("1"), "PNG"), (40, 30)),
        "sixteen bit.png": (encoded(Image.fromarray(np.full((3, 2), 40000, dtype=np.uint16)), "PNG"), (2, 3)),
        "exif behind the pixels.png": (turned_png(), (4, 6)),
        "byte by byte.png": (png(6, 4, pixels=_pieces(zlib.compress(bytes(28)))), (6, 4)),
        "html.gif": (encoded(noise.convert("P"), "GIF", comment=b"<script>alert(1)</script>"), (40, 30)),
        "fax.tif": (encoded(noise.convert("1"), "TIFF", compression="group4"), (40, 30)),
        "lab.tif": (encoded(Image.new("LAB", (5, 4)), "TIFF"), (5, 4)),
        "animated.webp": (encoded(noise, "WEBP", save_all=True, append_images=[grey.convert("RGB")]), (40, 30)),
    }
    return files


def _pieces(data: bytes) -> bytes:
    """Pixel chunks of one byte each."""
    return b"".join(chunk(b"IDAT", data[place : place + 1]) for place in range(len(data)))


def _gif(extension: bytes) -> bytes:
    """A 1x1 GIF with an extension, thousands of times, in front of its pixel."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + extension * 300_000 + b"\x2c\0\0\0\0\1\0\1\0\0\x02\x02\x44\x01\0;"


def costly_images() -> dict[str, Callable[[], bytes]]:
    """Name -> what makes the file; each is refused, or opened with little work."""
    jpeg = encoded(Image.new("RGB", (8, 8)), "JPEG")
    megabyte = zlib.compress(b"a" * 1_000_000, 9)
    huge = zlib.compress(b"a" * 50_000_000, 9)
    strips: list[int] = [-1] * 150_000
    return {
        "text of 50 MB.png": lambda: png(8, 8, chunk(b"zTXt", b"Comment\0\0" + huge)),
        "40 texts of 1 MB.png": lambda: png(8, 8, chunk(b"iTXt", b"C\0\1\0\0\0" + megabyte) * 40),
        "texts behind.png": lambda: png(8, 8, after=chunk(b"zTXt", b"C\0\0" + megabyte) * 40),
        "profile of 50 MB.png": lambda: png(8, 8, chunk(b"iCCP", b"p\0\0" + huge)),
        "300,000 texts.png": lambda: png(8, 8, chunk(b"tEXt", b"C\0a") * 300_000),
        "pixels in crumbs.png": lambda: png(700, 700, pixels=_pieces(zlib.compress(bytes(701 * 700), 0))),
        "exif of 60,000 tags.png": lambda: png(8, 8, chunk(b"eXIf", _tags(60_000))),
        "raw exif of 30,000 tags.png": lambda: png(8, 8, _raw_profile(_tags(30_000))),
        "exif of 60,000 tags.jpg": lambda: jpeg[:2] + _segments(_tags(60_000)) + jpeg[2:],
        "index of 5,000 tags.mpo": lambda: jpeg[:2] + _segment(0xE2, b"MPF\0" + _tags(5000, 5000)) + jpeg[2:],
        "60,000 tags.tif": lambda: _tags(60_000),
        "comments.gif": lambda: _gif(b"\x21\xfe\x01a\0"),
        "extensions.gif": lambda: _gif(b"\x21\xff\x01a\0"),
        "segments.jpg": lambda: jpeg[:2] + b"\xff\xe5\0\x02" * 300_000 + jpeg[2:],
        "fill bytes.jpg": lambda: jpeg[:2] + b"\xff" * 1_000_000 + jpeg[2:],
        "profile of 12 MB.jpg": lambda: jpeg[:2] + _segment(0xE2, bytes(65533)) * 190 + jpeg[2:],
        "exif of 2 MB.jpg": lambda: jpeg[:2] + _segments(bytes(2_000_000)) + jpeg[2:],
        "1,000 scans.jpg": lambda: _scans(1000),
        "150,000 strips.tif": lambda: tiff(4, 150_000, 1, bytes(4), {273: strips, 278: [1], 279: [4] * len(strips)}),
        "one strip of 4 GB.tif": lambda: tiff(100, 100, 8, huge, {273: [-1], 278: [100], 279: [0xFFFFFFF0]}),
        "strip of 50 MB.tif": lambda: tiff(100, 100, 8, huge, {273: [-1], 278: [100], 279: [len(huge)]}),
        "tile of 16,384.tif": lambda: tiff(10, 10, 8, huge, {322: [16384], 323: [16384], 324: [-1], 325: [len(huge)]}),
    }


def _tags(count: int, size: int = 100_000) -> bytes:
    """A TIFF's directory, or an EXIF block, of entries that all name the same bytes."""
    entries = b"".join(struct.pack(">HHLL", tag, 7, size, 8) for tag in range(count))
    return b"MM\0*" + struct.pack(">LH", 8, count) + entries + bytes(size)


def _segment(marker: int, data: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def _segments(block: bytes) -> bytes:
    """An EXIF block in as many segments as it takes, which PIL joins."""
    pieces = (block[start : start + 65_000] for start in range(0, len(block), 65_000))
    return b"".join(_segment(0xE1, b"Exif\0\0" + piece) for piece in pieces)


def _raw_profile(block: bytes) -> bytes:
    """An EXIF block as older programs put it into a PNG, in hexadecimal digits."""
    text = b"\nexif\n%8d\n" % len(block) + block.hex().encode()
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


def _scans(times: int) -> bytes:
    """A progressive JPEG of 4 million pixels whose last scan comes again and again."""
    data = encoded(Image.new("RGB", (2000, 2000), "green"), "JPEG", progressive=True, quality=50)
    last, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:last] + data[last:end] * times + data[end:]
