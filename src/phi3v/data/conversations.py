"""From one record that holds a conversation to a `Row`, in the three shapes in which people keep them.

| format | columns | an image's place |
|---|---|---|
| `messages` (TRL, chat APIs) | `messages`: a list of {role, content}, content text or parts | an image part |
| `prompt_completion` (TRL) | `prompt` and `completion`, each text or a list of messages | an image part |
| `conversations` (LLaVA, ShareGPT) | `conversations`: a list of {from, value} | `<image>` in a user turn |

Images stand in the column that `data.images` names, else in `image`, or where that is empty in `images`, or each in its
part; a row in which nothing stands there has none. A part that names its image keeps it, and the column fills the other
parts. Where a conversation names no place, its images stand before the first question. Other
text is literal, `<image>` included. Reason codes beside those of `cells`: `conversation_type`, `turn_role`,
`turn_order`, `empty_question`, `empty_answer`, `image_tags` (places and images differ in number, or parts
and column in what they name) and `unclear_tags` (`<image>` may be text or a place).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from phi3v.data.cells import Cells
from phi3v.data.columns import ColumnMap, Format, RowOptions, check_image_column
from phi3v.data.json_text import parse_json
from phi3v.data.schema import ImagePart, ImageRef, Message, Role, Row, TextPart, UnusableRecord
from phi3v.data.templates import Template, Unread, known_columns, whole_text
from phi3v.data.text_guard import MAX_DEPTH, is_too_deep
from phi3v.errors import DataError

Shape = Literal["messages", "prompt_completion", "conversations"]
IMAGE_TAG = "<image>"
SHAPES: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
}
"""Format -> the columns that make a set one of it."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_INSIDE_JSON = "json."
"""How columns of a webdataset's json member begin."""


@dataclass(frozen=True)
class ConversationMap:
    """How a record with a conversation becomes a row.

    Attributes:
        source: what rows and errors call the data set.
        shape: which of the three it is.
        cells: how cells are read; `cells.images` is the image column, None where there is none.
        named: the columns of the conversation: ("messages",), or ("prompt", "completion").
        system: template of a system message for records without one; None for none.
        chosen: True where the recipe says the format, False where the columns decided.
        other_images: column that a record's images are in where `cells.images` is empty; None for none.
        text_only: True where the recipe says that there are no images, so none of a part is read either.
    """

    source: str
    shape: Shape
    cells: Cells
    named: tuple[str, ...]
    system: Template | None = None
    chosen: bool = True
    other_images: str | None = None
    text_only: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, each once."""
        templated = self.system.columns if self.system else ()
        return tuple(dict.fromkeys([*self.named, *templated, *self._image_columns]))

    @property
    def _image_columns(self) -> tuple[str, ...]:
        """The columns in which images are looked for, in this order."""
        return tuple(column for column in (self.cells.images, self.other_images) if column is not None)

    def check(self, columns: list[str]) -> None:
        """Raises: DataError when a column is not among `columns`."""
        for column in self.named:
            if column not in columns:
                raise DataError(
                    f"data.format {self.shape} needs the column {column!r}, which {self.source} does not have"
                    f"{known_columns(column, columns)}"
                )
        if self.system is not None:
            self.system.check(columns, self.source)
        check_image_column(self.cells.images, columns, self.source)

    def image_cells(self, record: Mapping[str, Any]) -> list[Any]:
        """The image cells of a record, in the order of their places.

        Example: the image parts name "a.jpg", nothing and "c.jpg", the column holds ["b.jpg"] -> a.jpg, b.jpg, c.jpg.
        Raises: UnusableRecord where parts name their images and the column holds others.
        """
        if self.text_only:
            return []
        column = self._column_cells(record)
        parts = [cell for turn in self._turns(record) for cell in _part_cells(turn)]
        named = [cell for cell in parts if not _is_empty(cell)]
        if not named or not column:
            return column or named
        if len(column) == len(parts) - len(named):
            others = iter(column)
            return [next(others) if _is_empty(cell) else cell for cell in parts]
        agreed = all(_is_empty(cell) or _is_same(cell, other) for cell, other in zip(parts, column, strict=False))
        if agreed and len(column) == len(parts):
            return column
        raise UnusableRecord(
            "image_tags", f"its content parts name other images than the column {self._filled(record)!r} holds"
        )

    def row(self, record: Mapping[str, Any], index: int) -> Row:
        """The row of a record, its images unopened.

        Example, LLaVA: {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
        {"from": "gpt", "value": "A scarf."}]} -> Message("user", (ImagePart(0), TextPart("What is it?"))),
        Message("assistant", (TextPart("A scarf."),)), images (ImageRef("a.jpg"),).
        Raises: UnusableRecord.
        """
        turns = self._turns(record)
        cells = replace(self.cells, images=self._filled(record))
        images: tuple[ImageRef, ...] = tuple(cells.image(cell) for cell in self.image_cells(record))
        spoken = [self._message(turn) for turn in turns]
        if self.system is not None and spoken[0][0] != "system":
            texts = {column: self.cells.text(column, record.get(column)) for column in self.system.columns}
            spoken.insert(0, ("system", [self.system.render(texts)]))
        _check_order([role for role, _ in spoken])
        if not self.chosen and self.shape != "conversations":
            self._check_tags(spoken, len(images))
        return Row(_place_images(spoken, len(images)), images, {}, self.source, index)

    def _column_cells(self, record: Mapping[str, Any]) -> list[Any]:
        """The cells of the image column; nothing there is no image: None, "" and [] -> []."""
        column = self._filled(record)
        value = None if column is None else record.get(column)
        if _is_empty(value):
            return []
        return value if isinstance(value, list) else [value]

    def _filled(self, record: Mapping[str, Any]) -> str | None:
        """The first image column with something in it: {"image": None, "images": ["a.jpg"]} -> "images"."""
        columns = self._image_columns
        return next((column for column in columns if not _is_empty(record.get(column))), self.cells.images)

    def _turns(self, record: Mapping[str, Any]) -> list[Any]:
        """The turns of a record as the set spells them; a prompt or completion of text is one turn.

        Example: {"conversations": {"from": ["human"], "value": ["Hi"]}}, as some Parquet files have it -> [{"from":
        "human", "value": "Hi"}].
        """
        turns: list[Any] = []
        for column, role in zip(self.named, ("user", "assistant"), strict=False):
            value = record.get(column)
            if isinstance(value, str) and self.shape == "prompt_completion":
                value = [{"role": role, "content": value}]
            elif isinstance(value, str):
                value = _parsed(value, column)
            if isinstance(value, Mapping) and value and all(isinstance(listed, list) for listed in value.values()):
                value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=False)]
            if value is None or value == []:
                raise UnusableRecord("missing_value", f"column {column!r} is empty")
            if isinstance(value, Unread):
                raise UnusableRecord("value_type", f"column {column!r} {value.reason}")
            if not isinstance(value, list):
                kind = type(value).__name__
                raise UnusableRecord("conversation_type", f"column {column!r} holds a {kind} and no list of turns")
            turns += value
        return turns

    def _message(self, turn: Any) -> tuple[Role, list[str | None]]:
        """Who speaks, and texts and image places (None) in their order.

        Example: {"from": "human", "value": "<image>\\nWhat?"} -> ("user", [None, "What?"]).
        """
        if not isinstance(turn, Mapping):
            raise UnusableRecord("conversation_type", f"a turn is a {type(turn).__name__} and no mapping")
        spelled = turn.get("from") if turn.get("role") is None else turn["role"]
        role = _ROLES.get(spelled.strip().lower()) if isinstance(spelled, str) else None
        if role is None:
            raise UnusableRecord("turn_role", f"a turn is spoken by {str(spelled)[:40]!r}, and not by {_known_roles()}")
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        if isinstance(content, str):
            _check_text(content)
            tagged = self.shape == "conversations" and role == "user"
            return role, _at_tags(content) if tagged else [content]
        if content is None:
            return role, []
        if not isinstance(content, list):
            raise UnusableRecord("conversation_type", f"a turn holds a {type(content).__name__}, no text and no parts")
        return role, [_part(part) for part in content]

    def _check_tags(self, spoken: Sequence[tuple[Role, list[str | None]]], images: int) -> None:
        """Raises: UnusableRecord when `<image>` stands in the text as often as there are images: it is not guessed."""
        pieces = [piece for role, pieces in spoken if role == "user" for piece in pieces]
        tags = sum(piece.count(IMAGE_TAG) for piece in pieces if piece is not None)
        if images and None not in pieces and tags == images:
            raise UnusableRecord(
                "unclear_tags",
                f"its text holds {IMAGE_TAG} as often as there are images: say data.format: conversations when they "
                f"stand there, data.format: {self.shape} when it is text",
            )


def choose_format(columns: Sequence[str], options: RowOptions, source: str) -> Format:
    """The format of a set by its columns, where the recipe says "auto".

    Templates of the recipe's own mean "columns"; else the columns decide, and where they fit several formats the recipe
    has to. Example: ["id", "image", "conversations"] -> "conversations"; ["image", "prompt", "answer"] -> "columns".
    Raises: DataError when several formats fit.
    """
    if options.format != "auto":
        return options.format
    if options.has_templates:
        return "columns"
    fitting: list[Format] = [
        shape for shape, named in SHAPES.items() if all(_find(column, columns) is not None for column in named)
    ]
    if "prompt" in columns and "answer" in columns:
        fitting.append("columns")
    if len(fitting) > 1:
        raise DataError(f"{source} has the columns of several formats: say data.format: {' or '.join(fitting)}")
    return fitting[0] if fitting else "columns"


def record_map(columns: Sequence[str], options: RowOptions, source: str, cells: Cells) -> "ColumnMap | ConversationMap":
    """The map of a set with these columns. Raises: DataError, see `choose_format`; columns are not checked here."""
    shape = choose_format(columns, options, source)
    system = None if options.system is None else Template(options.system, "system")
    if shape == "auto" or shape == "columns":
        prompt, answer = Template(options.prompt, "prompt"), Template(options.answer, "answer")
        return ColumnMap(source, cells, prompt, answer, system)
    if options.has_templates:
        raise DataError(
            f"data.format {shape} reads whole conversations: take data.prompt and data.answer out ({source})"
        )
    named = SHAPES[shape]
    if shape == "conversations" and _find("conversations", columns) is None and _find("messages", columns):
        named = ("messages",)
    named = tuple(_find(column, columns) or column for column in named)
    images, other = cells.images, None
    if images == "image":  # where nothing is said
        found = [place for name in ("image", "images") if (place := _find(name, columns)) is not None]
        images, other = [*found, None, None][:2]
    chosen, text_only = options.format != "auto", options.images is None
    cells = replace(cells, images=images)
    return ConversationMap(source, shape, cells, named, system, chosen, other, text_only)


def _find(column: str, columns: Sequence[str]) -> str | None:
    """A column under its name, or inside the json member of a webdataset."""
    return next((name for name in (column, _INSIDE_JSON + column) if name in columns), None)


def _is_empty(value: Any) -> bool:
    """Whether an image cell holds nothing: None, "", [] and {"bytes": None, "path": None}."""
    return value is None or value in ("", []) or (isinstance(value, Mapping) and not any(value.values()))


def _is_same(cell: Any, other: Any) -> bool:
    """Whether two image cells are one image: "a.jpg" and {"bytes": b"...", "path": "a.jpg"}."""
    paths = [one.get("path") if isinstance(one, Mapping) else one for one in (cell, other)]
    return bool(cell == other or (isinstance(paths[0], str) and paths[0] == paths[1]))


def _known_roles() -> str:
    """The roles in words."""
    return ", ".join(_ROLES)


def _parsed(value: str, column: str) -> Any:
    """A conversation that a CSV or Parquet cell holds as JSON text."""
    if is_too_deep(value):
        raise UnusableRecord("conversation_type", f"column {column!r} nests more than {MAX_DEPTH} lists and mappings")
    try:
        return parse_json(value) if value.strip() else None
    except (ValueError, RecursionError):
        message = f"column {column!r} holds text and no list of turns"
        raise UnusableRecord("conversation_type", message) from None


def _part(part: Any) -> str | None:
    """A content part: its text, or None for an image.

    Example: {"type": "text", "text": "What?"} -> "What?"; {"type": "image"} -> None.
    """
    if isinstance(part, str):
        return _check_text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _check_text(part["text"])
    if kind in ("image", "image_url"):
        return None
    raise UnusableRecord("conversation_type", "a content part is neither {type: text, text: ...} nor {type: image}")


def _check_text(text: str) -> str:
    """The text itself. Raises: UnusableRecord for text that no tokenizer reads."""
    try:
        return whole_text(text)
    except TypeError as error:
        raise UnusableRecord("value_type", f"a turn {error}") from error


def _part_cells(turn: Any) -> Iterator[Any]:
    """The image cells in a turn's parts: {"type": "image", "image": "a.jpg"} -> "a.jpg"; chat APIs' image_url too."""
    content = turn.get("content") if isinstance(turn, Mapping) else None
    for part in content if isinstance(content, list) else []:
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            cells = [part.get(name) for name in ("image", "path", "url", "image_url")]
            cell = next((cell for cell in cells if not _is_empty(cell)), None)
            yield cell["url"] if isinstance(cell, Mapping) and "url" in cell else cell


def _at_tags(text: str) -> list[str | None]:
    """A text cut at its `<image>` tags, each with the line break that sets it off.

    Example: "<image>\\nWhat?" -> [None, "What?"]; "This <image> or\\n<image>" -> ["This ", None, " or", None].
    """
    pieces: list[str | None] = []
    texts = text.split(IMAGE_TAG)
    for number, piece in enumerate(texts):
        if number:
            pieces.append(None)
            piece = piece.removeprefix("\n")
        if number == len(texts) - 2 and texts[-1] == "":
            piece = piece.removesuffix("\n")  # the template sets a picture off itself
        if piece:
            pieces.append(piece)
    return pieces


def _check_order(roles: list[Role]) -> None:
    """Raises: UnusableRecord unless, after an optional system turn, user and assistant take turns to the answer."""
    turns = roles[1:] if roles[:1] == ["system"] else roles
    wanted = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != wanted:
        heard = ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
        raise UnusableRecord(
            "turn_order",
            f"the turns are {heard}: after an optional system turn, user and assistant alternate and the last answers",
        )


def _place_images(spoken: Sequence[tuple[Role, list[str | None]]], images: int) -> tuple[Message, ...]:
    """Messages with their images in place, each once, in order.

    Example: [("user", [None, "What?"]), ("assistant", ["A hat."])] with 1 image -> the user's parts are (ImagePart(0),
    TextPart("What?")); with [("user", ["What?"]), ...] and 1 image too.
    Raises: UnusableRecord.
    """
    places = sum(piece is None for _, pieces in spoken for piece in pieces)
    leading = images if not places else 0
    if places and places != images:
        raise UnusableRecord("image_tags", f"the turns have {places} places for images, and there are {images} images")
    messages, count = [], 0
    for role, pieces in spoken:
        if role == "user" and leading:
            pieces, leading = [*([None] * leading), *pieces], 0
        if role != "user" and None in pieces:
            raise UnusableRecord("image_tags", f"an image stands in a turn of the {role}, and not in a question")
        parts: list[TextPart | ImagePart] = []
        for piece in pieces:
            parts.append(ImagePart(count) if piece is None else TextPart(piece))
            count += piece is None
        blank = not any(isinstance(part, ImagePart) or part.text.strip() for part in parts)
        if blank and role == "system":
            continue
        if blank:
            raise UnusableRecord(
                "empty_answer" if role == "assistant" else "empty_question", f"a turn of the {role} is empty"
            )
        messages.append(Message(role, tuple(parts)))
    return tuple(messages)
