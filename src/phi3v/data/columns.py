"""From one record (column -> value) to a `Row` by templates: the column map, applied once, at the border.

In come plain records, images undecoded; out come rows, or `UnusableRecord` with a reason code of `cells`. Here also:
`RowOptions`, how records become rows as a recipe says it. Records that hold whole conversations are read by
`conversations`. Knows nothing about files or splits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from phi3v.data.cells import Cells, placed_cells
from phi3v.data.images import MAX_PIXELS
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart, UnusableRecord
from phi3v.data.templates import Template, known_columns
from phi3v.errors import DataError

Format = Literal["auto", "columns", "messages", "prompt_completion", "conversations"]


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How records become rows, as a recipe says it.

    Attributes:
        format: the shape of the records; "auto" decides by their columns, see `conversations.choose_format`.
        prompt: template of the question.
        answer: template of the answer.
        images: column of the image or of a list of images; None for text only.
        system: template of the system message; None for none.
        image_root: folder that image paths count from; None for the data file's own folder.
        allow_outside_root: True lets image paths leave that folder.
        max_pixels: images with more pixels are unusable.
        answered: False reads questions alone: answers need not be there, and are not looked at.
    """

    format: Format = "auto"
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    images: str | None = "image"
    system: str | None = None
    image_root: str | None = None
    allow_outside_root: bool = False
    max_pixels: int = MAX_PIXELS
    answered: bool = True

    @property
    def has_templates(self) -> bool:
        """Whether question or answer are templates of the recipe's own."""
        return (self.prompt, self.answer) != ("{prompt}", "{answer}")


@dataclass(frozen=True)
class ColumnMap:
    """Which columns and templates make a row.

    Attributes:
        source: what rows and errors call the data set.
        cells: how cells are read, the image column among them.
        prompt: template of the question.
        answer: template of the answer; None for questions alone.
        system: template of the system message; None for none.
    """

    source: str
    cells: Cells
    prompt: Template
    answer: Template | None
    system: Template | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, each once."""
        templates = [self.system, self.prompt, self.answer]
        named = [column for template in templates if template is not None for column in template.columns]
        return tuple(dict.fromkeys([*named, *([self.cells.images] if self.cells.images is not None else [])]))

    def check(self, columns: list[str]) -> None:
        """Raises: DataError when a template or `images` names a column that is not among `columns`."""
        for template in (self.system, self.prompt, self.answer):
            if template is not None:
                template.check(columns, self.source)
        check_image_column(self.cells.images, columns, self.source)

    def image_cells(self, record: Mapping[str, Any]) -> list[Any]:
        """The image cells of a record; several only where the column holds lists.

        An empty list says that the row has no image; an empty cell says nothing and is a problem.
        Example: ["a.jpg", "b.jpg"] -> two cells, [] -> none, None -> [None], which is no image.
        """
        return [cell for cell, _ in self._placed(record)]

    def _placed(self, record: Mapping[str, Any]) -> list[tuple[Any, str]]:
        """The image cells with what lines call them."""
        column = self.cells.images
        return [] if column is None else placed_cells(column, record.get(column))

    def row(self, record: Mapping[str, Any], index: int) -> Row:
        """The row of a record, its images unopened. Raises: UnusableRecord."""
        images: tuple[ImageRef, ...] = tuple(self.cells.image(*placed) for placed in self._placed(record))
        texts = {
            column: self.cells.text(column, record.get(column))
            for template in (self.system, self.prompt, self.answer)
            if template is not None
            for column in template.columns
        }
        question = TextPart(self.prompt.render(texts))
        messages = [Message("system", (TextPart(self.system.render(texts)),))] if self.system is not None else []
        messages.append(Message("user", (*(ImagePart(number) for number in range(len(images))), question)))
        if self.answer is None:
            return Row(tuple(messages), images, texts, self.source, index)
        answer = self.answer.render(texts)
        if not answer.strip():
            raise UnusableRecord("missing_value", "the answer is empty")
        messages.append(Message("assistant", (TextPart(answer),)))
        fields = {column: texts[column] for column in self.answer.columns}
        return Row(tuple(messages), images, fields, self.source, index)


def check_image_column(images: str | None, columns: list[str], source: str) -> None:
    """Raises: DataError when the image column is not among `columns`."""
    if images is not None and images not in columns:
        raise DataError(
            f"data.images names the column {images!r}, which {source} does not have"
            f"{known_columns(images, columns)} (data.images: null for text without images)"
        )
