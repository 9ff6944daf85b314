"""From one record (column -> value) to a `Row`: the column map with its templates, applied once, at the border.

In come plain records as `datasets` gives them, images undecoded; out come rows, or `UnusableRecord` with a reason code.
Knows nothing about files, formats or splits. Reason codes: `missing_value` (a template's column is empty), `value_type`
(a value that no template can show), `image_missing`, `image_type`, `image_path` (not there, no file, outside the root)
and `image_unreadable` (the header is no image that `images` accepts).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from phi3v.data.images import MAX_PIXELS, WEB_ADDRESS, image_size, resolve_path
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.data.templates import Template, cell_text, known_columns
from phi3v.errors import DataError, ImageError


class UnusableRecord(Exception):
    """A record that cannot become a row; `reason_code` is for machines, the text for people."""

    def __init__(self, reason_code: str, message: str) -> None:
        """Keep code and text."""
        super().__init__(message)
        self.reason_code = reason_code


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How records become rows, as a recipe says it.

    Attributes:
        prompt: template of the question.
        answer: template of the answer.
        images: column of the image or of a list of images; None for text only.
        system: template of the system message; None for none.
        image_root: folder that image paths count from; None for the data file's own folder.
        allow_outside_root: True lets image paths leave that folder.
        max_pixels: images with more pixels are unusable.
    """

    prompt: str = "{prompt}"
    answer: str = "{answer}"
    images: str | None = "image"
    system: str | None = None
    image_root: str | None = None
    allow_outside_root: bool = False
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class ColumnMap:
    """Which columns and templates make a row.

    Attributes:
        source: what rows and errors call the data set.
        images: column of the image or of a list of images; None for text only.
        prompt: template of the question.
        answer: template of the answer.
        system: template of the system message; None for none.
        root: folder that image paths count from; None for the current directory.
        confined: True refuses image paths that leave `root`.
        labels: column -> names of its numbers, for columns of class labels.
        single_floats: columns of 32-bit floats, whose values are shown with their own few digits.
    """

    source: str
    images: str | None
    prompt: Template
    answer: Template
    system: Template | None = None
    root: str | None = None
    confined: bool = True
    labels: Mapping[str, list[str]] = field(default_factory=dict)
    single_floats: frozenset[str] = frozenset()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, each once."""
        templates = [self.system, self.prompt, self.answer]
        named = [column for template in templates if template is not None for column in template.columns]
        return tuple(dict.fromkeys([*named, *([self.images] if self.images is not None else [])]))

    def check(self, columns: list[str]) -> None:
        """Raises: DataError when a template or `images` names a column that is not among `columns`."""
        for template in (self.system, self.prompt, self.answer):
            if template is not None:
                template.check(columns, self.source)
        if self.images is not None and self.images not in columns:
            raise DataError(
                f"data.images names the column {self.images!r}, which {self.source} does not have"
                f"{known_columns(self.images, columns)} (data.images: null for text without images)"
            )

    def row(self, record: Mapping[str, Any], index: int) -> Row:
        """The row of a record, its images unopened.

        Raises: UnusableRecord; DataError for an image that is a web address, which stops the whole set.
        """
        images = tuple(self._images(record, index))
        texts = {
            column: self._text(column, record[column])
            for template in (self.system, self.prompt, self.answer)
            if template is not None
            for column in template.columns
        }
        question = TextPart(self.prompt.render(texts))
        answer = self.answer.render(texts)
        if not answer.strip():
            raise UnusableRecord("missing_value", "the answer is empty")
        messages = [Message("system", (TextPart(self.system.render(texts)),))] if self.system is not None else []
        messages.append(Message("user", (*(ImagePart(number) for number in range(len(images))), question)))
        messages.append(Message("assistant", (TextPart(answer),)))
        fields = {column: texts[column] for column in self.answer.columns}
        return Row(tuple(messages), images, fields, self.source, index)

    def _text(self, column: str, value: Any) -> str:
        """A cell as text."""
        if column in self.labels and isinstance(value, int):
            value = self.labels[column][value] if 0 <= value < len(self.labels[column]) else None
        if column in self.single_floats and isinstance(value, float):
            value = float(str(np.float32(value)))
        try:
            text = cell_text(value)
        except TypeError as error:
            raise UnusableRecord("value_type", f"column {column!r} {error}") from error
        if text is None:
            raise UnusableRecord("missing_value", f"column {column!r} is empty")
        return text

    def _images(self, record: Mapping[str, Any], index: int) -> list[ImageRef]:
        """The images of a record; a list of several only where the column holds lists.

        An empty list says that the row has no image; an empty cell says nothing and is a problem.
        Example: ["a.jpg", "b.jpg"] -> two images, [] -> none, None -> UnusableRecord.
        """
        if self.images is None:
            return []
        value = record[self.images]
        cells = value if isinstance(value, list) else [value]
        return [self._image(cell, index) for cell in cells]

    def _image(self, cell: Any, index: int) -> ImageRef:
        """One image cell: a path, bytes, or a mapping {bytes, path}.

        Example: {"bytes": None, "path": "a.jpg"} -> ImageRef("a.jpg", root=self.root, confined=self.confined).
        """
        path, data = cell, None
        if isinstance(cell, Mapping):
            path, data = cell.get("path"), cell.get("bytes")
        elif isinstance(cell, bytes):
            path, data = None, cell
        if data is None and (path is None or path == ""):
            raise UnusableRecord("image_missing", f"column {self.images!r} is empty")
        if not isinstance(data, bytes | None) or not isinstance(path, str | None):
            kind = type(cell).__name__
            raise UnusableRecord("image_type", f"column {self.images!r} holds a {kind}, which is no path and no image")
        if data is None and path is not None and WEB_ADDRESS.match(path):
            raise DataError(
                f"{self.source}, row {index}: column {self.images!r} holds the web address {path[:100]}, and images "
                "are not downloaded yet: download them and name their paths in the column that data.images gives"
            )
        return ImageRef(path, data, self.root, self.confined)


def check_images(row: Row, max_pixels: int) -> None:
    """Looks at the path and the header of every image of a row. Raises: UnusableRecord."""
    for image in row.images:
        try:
            if image.data is None:
                resolve_path(image)
        except ImageError as error:
            raise UnusableRecord("image_path", str(error)) from error
        try:
            image_size(image, max_pixels=max_pixels)
        except ImageError as error:
            raise UnusableRecord("image_unreadable", str(error)) from error


def group_keys(row: Row) -> list[str]:
    """What ties a row to other rows: its images, by content where it holds them, by path below the root where it names
    them; for a row without images its text.

    Example: ImageRef("/photos/a.jpg", root="/photos") and ImageRef("a.jpg", root="/photos") both give "path:a.jpg".
    """
    if not row.images:
        return ["text:" + "\0".join(message.text for message in row.messages)]
    return [_image_key(image) for image in row.images]


def _image_key(image: ImageRef) -> str:
    """The key of one image."""
    if image.data is not None:
        return "bytes:" + sha256(image.data).hexdigest()
    root = Path(image.root or ".").resolve()
    path = resolve_path(replace(image, confined=False))
    return "path:" + (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
