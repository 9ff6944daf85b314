"""The vocabulary of the data path: what a row is once no file format, column name or template is left in it.

`sources` makes these, `encode` turns them into token ids. Plain frozen values that can be pickled; nothing here opens a
file. Rows count from 0, in the order of their source.
"""

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
TrainOn = Literal["last_assistant", "all_assistant"]
"""Which assistant turns of a conversation are trained."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that was not opened yet.

    Attributes:
        path: the file as the source names it, or a name to show when there are bytes; None without a name.
        data: the encoded file itself, None when it lies at `path`.
        root: folder that a relative path counts from, None for the current directory.
        confined: True refuses a path that leads out of `root`, or out of `within`.
        url: the web address that the file was downloaded from; `path` is then the file in the image cache, None while
            it is not there.
        size: width and height of the upright image, where it was looked at.
        fingerprint: of the file, where it was looked at, see `images.ImageLook`.
        within: folder that holds `root` and all that links in it may lead to; None for `root` itself.
    """

    path: str | None = None
    data: bytes | None = None
    root: str | None = None
    confined: bool = False
    url: str | None = None
    size: tuple[int, int] | None = field(default=None, compare=False, repr=False)
    fingerprint: int | None = field(default=None, compare=False, repr=False)
    within: str | None = None


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text in a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """The place of an image in a message; `index` counts in `Row.images`."""

    index: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks, and texts and images in their order; an answer with `trained` False is never trained."""

    role: Role
    parts: tuple[TextPart | ImagePart, ...]
    trained: bool = True

    @property
    def text(self) -> str:
        """The texts of the message, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation of a data set.

    Example: the row {"image": "a.jpg", "title": "Scarf"} with prompt "What is it?" and answer "Product: {title}" is
        messages = (Message("user", (ImagePart(0), TextPart("What is it?"))),
                    Message("assistant", (TextPart("Product: Scarf"),)))
        images = (ImageRef("a.jpg", root="photos"),), fields = {"title": "Scarf"}, source = "shop.csv", index = 0

    Attributes:
        messages: the turns; images of a question stand before its text.
        images: the images, in the order in which the messages name them.
        fields: column -> text for the columns of the answer template; of a question without answer for those of its
            own templates.
        source: what the row was read from.
        index: number of the row in its source, from 0.
    """

    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...]
    fields: dict[str, str]
    source: str
    index: int

    @property
    def question(self) -> str:
        """The text of the last user turn, "" when there is none."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")

    @property
    def answer(self) -> str:
        """The text of the last turn when the assistant speaks it, else ""."""
        return self.messages[-1].text if self.messages and self.messages[-1].role == "assistant" else ""


class UnusableRecord(Exception):
    """A record that cannot become a row; `reason_code` is for machines, the text for people."""

    def __init__(self, reason_code: str, message: str) -> None:
        """Keep code and text."""
        super().__init__(message)
        self.reason_code = reason_code


@dataclass(frozen=True, slots=True)
class RowProblem:
    """A row that is left out, and why.

    Attributes:
        row: number of the row in its source, from 0.
        reason_code: one word for machines, "missing_value" for instance.
        message: one line for people, without the row's number.
        source: what the row was read from.
    """

    row: int
    reason_code: str
    message: str
    source: str

    def __str__(self) -> str:
        """`shop.csv, row 3: column price is empty`."""
        return f"{self.source}, row {self.row}: {self.message}"
