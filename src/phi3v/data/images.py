"""The one place where an image file becomes pixels. What is decided here:

| matter | decision |
|---|---|
| formats | JPEG (MPO too: its first picture), PNG, WebP, GIF, BMP, TIFF, by content whatever the name says; no others |
| several frames | the first |
| pixels | at most 20 million (`max_pixels`), by the header, before anything is decoded |
| work | a file that would cost a decoder far more than its pixels is refused: the limits are in `image_limits` |
| cut off or damaged files | refused; what could be decoded of them is not used |
| EXIF orientation | applied; an EXIF block that cannot be read means upright; XMP's is taken where EXIF has none |
| alpha, transparent colour | composited over white; the one colour that a PNG of 3 x 16 bits calls transparent is not |
| palette, 1 bit, grey | expanded to RGB |
| 16 bit | grey: scaled to 8 bit (value / 257, rounded); RGB: the high byte, by the decoder |
| 32-bit whole numbers | taken as 16 bit, clipped to 0..65535 |
| 32-bit floats | refused: nothing says what is white |
| CMYK, YCbCr, LAB, HSV | converted to RGB by PIL, ICC profiles ignored |
| size | as it is, no reduced-scale decoding |
| local paths | regular files only, checked on the open file; with `confined`, links followed, not outside the root |

Every failure is an `ImageError` of one line: the file and the reason; PIL's warnings about damaged files are not shown.
Knows nothing of rows, crops or models.
"""

import io
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from phi3v.data.address_guard import shorten
from phi3v.data.fast_jpeg import decode_jpeg
from phi3v.data.image_limits import (
    MeteredBytes,
    MeteredFile,
    begin_header,
    check_scans,
    check_size,
    end_header,
    find_exif,
    reason_of,
)
from phi3v.data.schema import ImageRef
from phi3v.errors import ImageError, ImagePathError

MAX_PIXELS = 20_000_000
WEB_ADDRESS = re.compile(r"(https?|ftp|s3|gs|hf):/", re.IGNORECASE)
"""How a web address begins, also one that was taken for a path, which has lost a slash."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION_TAG = 0x0112
_READ_WHOLE = 2**20  # bytes of a file that are hashed in one piece
_END = 1024  # bytes at each end of a file that are looked at; reading 12 takes as long
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the operation that makes the picture upright."""


def open_image(image: ImageRef | str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens, checks and decodes an image.

    Args:
        image: a reference from a row, a path, or the bytes of an encoded file.
        max_pixels: larger images are refused before they are decoded.
    Returns: an upright RGB image of its full size that holds no open file.
    Raises: ImageError in one line; never anything else, whatever the file holds.
    """
    with _opened(_as_ref(image), max_pixels) as (opened, file):
        orientation = _orientation(opened, file)
        return _decode(opened, file, orientation)


def open_pixels(image: ImageRef | str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image | np.ndarray:
    """As `open_image`, with JPEGs decoded by simplejpeg where it is installed.

    Returns: of a grey or RGB JPEG without faults an array uint8 [height, width, 3] of the pixels that `open_image`
        gives; of everything else what `open_image` returns.
    Raises: ImageError as `open_image` does.
    """
    with _opened(_as_ref(image), max_pixels) as (opened, file):
        orientation = _orientation(opened, file)
        if opened.format in ("JPEG", "MPO") and opened.mode in ("L", "RGB"):
            check_scans(file, opened.width * opened.height)
            file.seek(0)
            pixels_HWC = decode_jpeg(file.read())
            if pixels_HWC is not None and pixels_HWC.shape == (opened.height, opened.width, 3):
                return _turned(pixels_HWC, orientation)
        return _decode(opened, file, orientation)


def image_size(image: ImageRef | str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the upright image: from an earlier look at it, else from the header alone.

    Example: a 40x30 JPEG with EXIF orientation 6 -> (30, 40).
    Raises: ImageError as `open_image` does, for all that a header shows.
    """
    if isinstance(image, ImageRef) and image.size is not None and image.size[0] * image.size[1] <= max_pixels:
        return image.size
    with _opened(_as_ref(image), max_pixels) as (opened, file):
        return _upright_size(opened, _orientation(opened, file))


@dataclass(frozen=True, slots=True)
class ImageLook:
    """What one opening of an encoded image shows.

    Attributes:
        size: width and height of the upright image.
        fingerprint: 64 bits that stand for the file: for all of it where it was hashed or decoded, else for its length
            and the KiB at each of its ends, where a PNG has check sums of its pixels.
        digest: the SHA-256 of the whole file in hexadecimal digits; "" where nobody asked for it.
    """

    size: tuple[int, int]
    fingerprint: int
    digest: str = ""


def look_at(image: ImageRef, *, max_pixels: int = MAX_PIXELS, digest: bool = False) -> ImageLook:
    """Looks at a file once: its path, its header, its limits and its end; at its pixels only in doubt.

    A file that does not end as a whole JPEG, PNG, GIF or WebP does may be cut off, and of other formats the end tells
    nothing: these are decoded. Example: a JPEG that ends with b"\\xff\\xd9" is not; one that breaks off, or carries
    something behind its end, is.

    Args:
        image: the image.
        max_pixels: larger images are refused.
        digest: True reads the whole file.
    Raises: ImagePathError for a path that leads to no file or out of the root; ImageError as `open_image` does.
    """
    with _opened(image, max_pixels) as (opened, file):
        orientation = _orientation(opened, file)
        head, tail, length = _ends(file)
        whole = _digest(file) if digest else ""
        if _may_be_cut_off(head, tail, length):
            _decode(opened, file, orientation)
            whole = whole or _digest(file)
        fingerprint = int(whole[:16], 16) if whole else crc32(head, length) << 32 | crc32(tail, length)
        return ImageLook(_upright_size(opened, orientation), fingerprint, whole if digest else "")


def begins_as_image(head: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of a format that is read: b"\\xff\\xd8\\xff\\xe0..." -> True."""
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")):
        return True
    if head.startswith(b"BM"):
        return head[6:10] == bytes(4)
    return head.startswith(b"RIFF") and head[8:12] == b"WEBP"


def content_digest(image: ImageRef) -> str:
    """The SHA-256 of the encoded file, whatever its size. Raises: ImageError, OSError, ValueError when it is empty."""
    with _open_file(image, sys.maxsize) if image.data is None else MeteredBytes(image.data) as file:
        return _digest(file)


def image_name(image: ImageRef) -> str:
    """What people are told of an image: its web address, its path, or that it has none; half a character as \\ud83d."""
    name = shorten(image.url) if image.url is not None else image.path or "embedded image"
    name = name.encode("utf-8", "backslashreplace").decode()
    return name if len(name) <= 120 else name[:117] + "..."


def resolve_path(image: ImageRef) -> Path:
    """The file of a reference that holds no bytes.

    Example: ImageRef("../secret.png", root="photos", confined=True) -> ImagePathError.
    Raises: ImagePathError when it is not there, is no regular file, or leaves its root although it is confined.
    """
    return Path(_real_path(image))


def _real_path(image: ImageRef) -> str:
    """The same as text: a Path costs as much as half of following it."""
    name = image_name(image)
    if WEB_ADDRESS.match(image.path or ""):
        raise ImagePathError(f"image {name} is a web address, which is not fetched here: download it and name the file")
    path: str | None = None
    try:
        root = os.path.realpath(image.root or ".")  # pathlib's resolve takes twice the time, a third of a header
        path = os.path.realpath(os.path.join(root, image.path or ""))
        within = root if image.within is None else os.path.realpath(image.within)
        inside = path == within or path.startswith(os.path.join(within, ""))
        mode = os.stat(path).st_mode if inside or not image.confined else 0
    except FileNotFoundError as error:
        raise ImagePathError(f"image {name} does not exist (looked for {path})") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ImagePathError(f"image {name} cannot be reached: {reason_of(error, 0)}") from error
    if image.confined and not inside:
        raise ImagePathError(
            f"image {name} lies outside {within}: move it there, set data.image_root, "
            "or allow it with data.allow_outside_root: true"
        )
    if not stat.S_ISREG(mode):
        raise ImagePathError(f"image {name} is no regular file")
    return path


def _as_ref(image: ImageRef | str | Path | bytes) -> ImageRef:
    """Paths and bytes as references without a root."""
    if isinstance(image, ImageRef):
        return image
    return ImageRef(data=image) if isinstance(image, bytes) else ImageRef(path=str(image))


@contextmanager
def _opened(image: ImageRef, max_pixels: int) -> Iterator[tuple[Image.Image, MeteredBytes | MeteredFile]]:
    """The image with its header read and its limits checked, and its file; any failure inside is an ImageError."""
    name = image_name(image)
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
            if image.data is not None:
                check_size(len(image.data), max_pixels)
            file: MeteredBytes | MeteredFile = (
                MeteredBytes(image.data) if image.data is not None else _open_file(image, max_pixels)
            )
            stack.enter_context(file)
            begin_header(file, max_pixels)
            opened = stack.enter_context(Image.open(file, formats=_FORMATS))
            end_header(file)
            width, height = opened.size
            if width * height > max_pixels:
                raise ImageError(
                    f"image {name} has {width}x{height} pixels, more than the limit of {max_pixels}; "
                    "shrink it or raise image.max_pixels (--max-pixels of ask and predict)"
                )
            yield opened, file
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        known = "JPEG, PNG, WebP, GIF, BMP or TIFF"
        raise ImageError(f"image {name} is not a readable {known}; convert it or leave it out") from error
    except Exception as error:  # decoders raise SyntaxError, struct.error, MemoryError and what not
        raise ImageError(
            f"image {name} does not decode: {reason_of(error, max_pixels)}; replace it or leave it out"
        ) from error


def _open_file(image: ImageRef, max_pixels: int) -> MeteredFile:
    """The file of a reference that holds no bytes, opened for reading.

    Between the look at a path and its opening the file may be changed for a pipe or a link. So the open file itself is
    looked at: it is a regular one (without O_NONBLOCK opening a pipe would wait for ever), and it lies where the path
    was found to lead. Where the system does not say where it lies, or says another place, the path is followed again
    and must lead to this very file.
    """
    path = _real_path(image)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ImagePathError(f"image {image_name(image)} is no regular file")
        if _path_of(descriptor) != path and not os.path.samestat(found, os.stat(_real_path(image))):
            raise ImageError(f"image {image_name(image)} was changed while it was opened; try again")
        check_size(found.st_size, max_pixels)
        return MeteredFile(io.FileIO(descriptor, "rb"))
    except BaseException:
        os.close(descriptor)
        raise


def _path_of(descriptor: int) -> str | None:
    """Where the kernel says that an open file lies, all links followed; None where it does not say."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return None


def _ends(file: MeteredBytes | MeteredFile) -> tuple[bytes, bytes, int]:
    """The first and the last KiB of a file, and its length; b"abc" -> (b"abc", b"abc", 3)."""
    file.seek(0)
    head, length = file.read(_END), file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _END))
    return head, file.read(_END), length


def _may_be_cut_off(head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file does not end as a whole JPEG, PNG, GIF or WebP does, or its format has no end that tells."""
    if head.startswith(b"\xff\xd8"):
        return not tail.endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG"):
        return not tail.endswith(b"\0\0\0\0IEND\xaeB`\x82")
    if head.startswith(b"GIF8"):
        return not tail.endswith(b";")
    return head[:4] != b"RIFF" or int.from_bytes(head[4:8], "little") + 8 > size


def _digest(file: MeteredBytes | MeteredFile) -> str:
    """The SHA-256 of a whole file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size <= _READ_WHOLE:  # most are: for these the buffer of file_digest would cost as much as the hash
        return sha256(file.read()).hexdigest()
    return file_digest(file, "sha256").hexdigest()


def _upright_size(opened: Image.Image, orientation: int) -> tuple[int, int]:
    """Width and height of an image once it is turned; PIL has turned TIFFs already."""
    width, height = opened.size
    return (height, width) if orientation >= 5 else (width, height)


def _orientation(image: Image.Image, file: MeteredBytes | MeteredFile) -> int:
    """The orientation that is left to apply, 1 to 8; 1 (upright) where nothing readable says another.

    PIL turns TIFFs by itself. Of a PNG it would decode all pixels to look for an EXIF block behind them.
    """
    if image.format == "TIFF":
        return 1
    try:
        find_exif(image.info, file, png=image.format == "PNG")
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels, which may be sound
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode(opened: Image.Image, file: MeteredBytes | MeteredFile, orientation: int) -> Image.Image:
    """The upright RGB image of a file whose header was read."""
    if opened.format in ("JPEG", "MPO"):
        check_scans(file, opened.width * opened.height)
    file.seek(0)
    _mend_transparency(opened)
    opened.load()
    rgb = _to_rgb(opened)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _turned(pixels_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels made upright, as a view: 3 is both sides mirrored, 6 is transposed and then mirrored left to right."""
    if orientation >= 5:
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels_HWC[::down, ::across]


def _mend_transparency(opened: Image.Image) -> None:
    """Makes the transparent colour of a PNG one of the pixels that PIL gives, which it compares with it.

    PIL spreads grey of 2 and 4 bits over 0 to 255 and keeps the high bytes of 16-bit RGB, but not so of that colour: 1
    of 2 bits -> 85, 3 of 4 bits -> 51. Of 16-bit RGB nothing tells the colour from its neighbours once it is decoded.
    """
    colour = opened.info.get("transparency")
    tile = getattr(opened, "tile", None)
    kind = tile[0][3] if opened.format == "PNG" and tile else None
    if kind in ("L;2", "L;4") and isinstance(colour, int):
        most = 3 if kind == "L;2" else 15
        opened.info["transparency"] = (colour & most) * (255 // most)
    elif kind == "RGB;16B":
        opened.info.pop("transparency", None)


def _to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image as RGB, by the table above."""
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if image.mode == "F":
        raise ValueError("its pixels are 32-bit floats, and nothing says which is white")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        flat = Image.new("RGB", image.size, (255, 255, 255))
        flat.paste(rgba, mask=rgba.getchannel("A"))
        return flat
    if image.mode == "RGB" and image.format == "JPEG":
        return image  # loaded whole: a copy would cost as much as a fifth of decoding
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit grey as RGB; 0 -> 0, 257 -> 1, 65535 -> 255; a transparent grey becomes white."""
    values_HW = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey_HW = ((values_HW + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey_HW[values_HW == transparent] = 255
    return Image.fromarray(grey_HW).convert("RGB")
