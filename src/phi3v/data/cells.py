"""From the cells of a record to text and images: what may stand in a column, whatever the shape of the record.

In come single values as files and data sets hold them; out come texts and `ImageRef`s, unopened, or `UnusableRecord`
with a reason code: `missing_value`, `value_type`, `image_missing`, `image_type`, `image_path` (not there, no file,
outside the root), `image_unreadable`, `data_uri`, `url_scheme`, `url_invalid`, `url_private`, `url_not_cached`, and
the codes of failed downloads, which begin with `url_` too. Downloads nothing: a web address is looked up in the cache.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from phi3v.data.address_guard import AddressError, AllowedHosts, is_literal, parse_address, shorten
from phi3v.data.image_cache import FetchFailure, ImageCache
from phi3v.data.images import ImageLook, begins_as_image, content_digest, image_name, look_at
from phi3v.data.schema import ImageRef, Row, UnusableRecord
from phi3v.data.templates import Unread, cell_text, kind_of, whole_text
from phi3v.errors import ImageError, ImagePathError

MAX_EMBEDDED_BYTES = 20_000_000
"""The longest file in a data URI."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)
"""How an address begins; one letter is a drive. What takes an address for a path leaves one slash of two."""
_BARE_HOST = re.compile(r"www\.[^/\s]+\.[^/\s]+/", re.IGNORECASE)
"""How an address without a scheme begins, as people copy it: "www.shop.example/"."""
_SHORTEST_BASE64 = 64
"""Characters of a text that may be base64; shorter ones are names."""
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]++={0,2}\s*")
_LIST = re.compile(r"""\[\s*(?:\]|(["'{]).*["'}]\s*\])""", re.DOTALL)
"""A list as JSON or Python writes it into a CSV cell, `[]`, `["a.jpg"]`, `[{"path": "a.jpg"}]`; not `[1].jpg`."""
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Cells:
    """How the cells of one set are read.

    Attributes:
        images: column of the image or of a list of images (frames of a video are one); None for text only.
        root: folder that image paths count from; None for the current directory.
        confined: True refuses image paths that leave `root`, or `within`.
        within: folder above `root` that paths and links in it may lead to; None for `root` alone.
        labels: column -> names of its numbers, for columns of class labels.
        short_floats: columns of floats of 32 or 16 bits ("float32", "float16"), whose values have few digits.
        cache: where downloaded images lie; None refuses web addresses.
        wait_for_download: True takes a web address that is not cached as an image that is still to come.
        failures: web address -> why it could not be downloaded just now, beside what the cache remembers.
        allowed: hosts that may be private.
    """

    images: str | None = None
    root: str | None = None
    confined: bool = True
    within: str | None = None
    labels: Mapping[str, list[str]] = field(default_factory=dict)
    short_floats: Mapping[str, str] = field(default_factory=dict)
    cache: ImageCache | None = None
    wait_for_download: bool = False
    failures: Mapping[str, FetchFailure] = field(default_factory=dict)
    allowed: AllowedHosts = field(default_factory=AllowedHosts)

    def text(self, column: str, value: Any) -> str:
        """A cell as text. Raises: UnusableRecord."""
        if column in self.labels and isinstance(value, int):
            value = self.labels[column][value] if 0 <= value < len(self.labels[column]) else None
        if column in self.short_floats and isinstance(value, float) and (value % 1 or abs(value) > 2**24):
            # whole numbers stay: the shortest that reads back as the half float 10008 is 10010
            value = float(str(np.dtype(self.short_floats[column]).type(value)))
        try:
            text = cell_text(value)
        except TypeError as error:
            raise UnusableRecord("value_type", f"column {column!r} {error}") from error
        if text is None:
            raise UnusableRecord("missing_value", f"column {column!r} is empty")
        return text

    def image(self, cell: Any, place: str | None = None) -> ImageRef:
        """One image cell: a path, a web address, a data URI, bytes, or a mapping {bytes, path}.

        `place` is what lines call the cell, see `placed_cells`; None for the whole image column.
        Example: {"bytes": None, "path": "a.jpg"} -> ImageRef("a.jpg", root=self.root, confined=self.confined);
        "https://shop.example/a.jpg" -> ImageRef("ab/ab12", root=<cache>, confined=True, url=<the address>).
        Raises: UnusableRecord.
        """
        place = place or f"column {self.images!r}"
        path, data = cell, None
        if isinstance(cell, Mapping):
            path, data = cell.get("path"), cell.get("bytes")
            if isinstance(data, str):
                told = "holds text as bytes: write base64 as data:image/png;base64,..., or the path alone"
                raise UnusableRecord("image_type", f"{place} {told}")
            if not {"path", "bytes"} & set(cell) and any(value is not None for value in cell.values()):
                keys = ", ".join(map(repr, list(cell)[:3]))
                told = f"holds a mapping of {keys}: write its path or address alone, or {{'path': ..., 'bytes': ...}}"
                raise UnusableRecord("image_type", f"{place} {told}")
        elif isinstance(cell, bytes):
            path, data = None, cell
        if isinstance(cell, Unread):
            raise UnusableRecord("value_type", f"{place} {cell.reason}")
        if data is None and (path is None or path == ""):
            raise UnusableRecord("image_missing", f"{place} is empty")
        if not isinstance(data, bytes | None) or not isinstance(path, str | None):
            raise UnusableRecord("image_type", f"{place} holds {kind_of(cell)}, which is no path and no image")
        try:
            whole_text(path or "")
        except TypeError as error:
            name = image_name(ImageRef(Path(path or "").name))
            raise UnusableRecord("image_path", f"{place} {error} ({name})") from error
        if data is not None or path is None:
            return ImageRef(path, data, self.root, self.confined)
        address = path.strip(" ")
        if address[:5].lower() == "data:":
            return ImageRef(None, _embedded(address, place), self.root, self.confined)
        if scheme := _SCHEME.match(address):
            return self._from_web(address, scheme[1].lower(), place)
        if _is_base64(address):
            raise UnusableRecord("image_type", f"{place} holds base64: write it as data:image/png;base64,...")
        if _LIST.fullmatch(address):
            told = "holds a list as text, and a text is one path: write lists in a JSON or Parquet file"
            raise UnusableRecord("image_type", f"{place} {told}")
        return ImageRef(path, None, self.root, self.confined, within=self.within)

    def _from_web(self, url: str, scheme: str, place: str) -> ImageRef:
        """An image behind a web address: its file in the cache. An address that is never asked is refused at once."""
        if scheme not in ("http", "https") or self.cache is None:
            raise UnusableRecord(
                "url_scheme", f"{place} holds {shorten(url)}: only http and https addresses are downloaded"
            )
        folder = str(self.cache.folder)
        if (path := self.cache.path(url)) is not None:
            return ImageRef(str(path), None, folder, True, url)
        if (failure := self.failures.get(url) or self.cache.failure(url)) is not None:
            raise UnusableRecord(failure.reason_code, failure.message)
        try:
            address = parse_address(url)
        except AddressError as error:
            raise UnusableRecord("url_invalid", f"image {shorten(url)}: the address {error}") from error
        closed = self.allowed.refusal(address.host, address.port, address.host) if is_literal(address.host) else None
        if closed is not None:
            raise UnusableRecord("url_private", f"image {shorten(url)}: {closed}")
        if self.wait_for_download:
            return ImageRef(None, None, folder, True, url)
        raise UnusableRecord("url_not_cached", f"{shorten(url)} is not in the image cache: run the command again")


def placed_cells(column: str | None, value: Any) -> list[tuple[Any, str]]:
    """The image cells of a column's value, each with what lines call it.

    Example: "images", ["a.jpg", None] -> ("a.jpg", "image 1 of column 'images'"), (None, "image 2 of column 'images'");
    "image", "a.jpg" -> ("a.jpg", "column 'image'").
    """
    if isinstance(value, list):
        return [(cell, f"image {number} of column {column!r}") for number, cell in enumerate(value, start=1)]
    return [(value, f"column {column!r}")]


def named_image(cell: Any) -> str | None:
    """What an image cell says where its image lies: "a.jpg", {"path": "a.jpg", "bytes": None} -> "a.jpg"; an address
    without its query; None for bytes, for a data URI, and for a cell that says nothing.
    """
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    if not isinstance(path, str) or not path.strip() or path.lstrip(" ")[:5].lower() == "data:" or _is_base64(path):
        return None
    return shorten(path.strip(" ")) if _SCHEME.match(path.strip(" ")) else path


def _is_base64(text: str) -> bool:
    """Whether a text is an encoded image in base64: "iVBORw0KGgoAAAANSUhEUg..." -> True, "/9j/a.jpg" -> False."""
    if len(text) < _SHORTEST_BASE64:
        return False
    try:
        head = base64.b64decode(text[:24], validate=True)
    except ValueError:
        return False
    return begins_as_image(head[:16]) and _BASE64.fullmatch(text) is not None


def _embedded(text: str, place: str) -> bytes:
    """The file in a data URI: "data:image/png;base64,iVBORw0..." -> its bytes. Raises: UnusableRecord."""
    head = _DATA_URI.match(text)
    if head is None:
        raise UnusableRecord("data_uri", f"{place} holds a data URI that is not of the form data:image/png;base64,...")
    if (len(text) - head.end()) * 3 // 4 > MAX_EMBEDDED_BYTES:
        raise UnusableRecord("data_uri", f"{place} holds a data URI of more than {MAX_EMBEDDED_BYTES:,} bytes")
    try:
        return base64.b64decode("".join(text[head.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnusableRecord("data_uri", f"{place} holds a data URI that is no base64 ({error})") from error


Looks = Sequence[ImageLook | None]
"""What was seen of the images of a row; None for one that is still to be downloaded."""


def check_images(row: Row, max_pixels: int, *, digests: bool = False) -> Looks:
    """Looks at every image of a row, each file opened once, see `images.look_at`.

    Args:
        row: the row.
        max_pixels: larger images are unusable.
        digests: whether contents are hashed, for `group_keys`; what was downloaded is named by its hash already.
    Raises: UnusableRecord.
    """
    looks: list[ImageLook | None] = []
    for image in row.images:
        if image.url is not None and image.path is None:
            looks.append(None)
            continue
        try:
            looks.append(look_at(image, max_pixels=max_pixels, digest=digests and image.url is None))
        except ImagePathError as error:
            raise UnusableRecord("image_path", f"{_one_line(str(error))}{_way_out(image.path or '')}") from error
        except ImageError as error:
            raise UnusableRecord("image_unreadable", str(error)) from error
    return looks


def _one_line(text: str) -> str:
    """A text whose line breaks, which a path may hold, are shown as escapes."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _way_out(path: str) -> str:
    """What is easily overlooked of a path without an image: " 0.png" beside "0.png", "www.a.example/0.png" and
    "//a.example/0.png", which browsers alone take for addresses, "~/0.png", which shells alone take for a home.
    """
    if path != path.strip():
        return "; the path begins or ends with white space: take it away"
    if path.startswith("//") or _BARE_HOST.match(path):
        missing = "https:" if path.startswith("//") else "https://"
        return f"; if it is an address, write {missing} in front of it"
    return "; ~ is taken as it stands: write the whole path" if path.startswith("~") else ""


def group_keys(row: Row, looks: Looks = ()) -> list[str]:
    """What ties a row to other rows: the contents of its images, each once; for a row without images that of its text.

    Example: a.jpg, a copy of it and the same bytes embedded all give "bytes:" and their SHA-256.

    Args:
        row: the row.
        looks: what `check_images` saw of it with digests; without them files are read here. What was downloaded is
            named by its hash already, and what is still to come has its address.
    """
    if not row.images:
        texts = "\0".join(message.text for message in row.messages)
        return ["text:" + sha256(texts.encode("utf-8", "surrogatepass")).hexdigest()]
    seen = looks or [None] * len(row.images)
    return list(dict.fromkeys(_image_key(image, look) for image, look in zip(row.images, seen, strict=True)))


def _image_key(image: ImageRef, look: ImageLook | None) -> str:
    """The key of one image; a file that cannot be read just now has its path."""
    if image.url is not None:
        return "url:" + image.url if image.path is None else "bytes:" + Path(image.path).name
    if look is not None and look.digest:
        return "bytes:" + look.digest
    try:
        return "bytes:" + content_digest(image)
    except (OSError, ValueError):
        return f"path:{image.path}"
