"""From one record that holds a conversation to a `Row`, in the three shapes in which people keep them.

| format | columns | an image's place |
|---|---|---|
| `messages` (TRL, chat APIs) | `messages`: a list of {role, content}, content text or parts | an image part |
| `prompt_completion` (TRL) | `prompt` and `completion`, each text or a list of messages | an image part |
| `conversations` (LLaVA, ShareGPT) | `conversations`: a list of {from, value} | `<image>` in a user turn |

Images stand in the column that `data.images` names, else in `image`, or where that is empty in `images`, or each in its
part; a row in which nothing stands there has none. A part that names its image keeps it, and the column fills the other
parts. Where a conversation names no place, its images stand before the first question. Other text is literal, `<image>`
included. Reason codes beside those of `cells` and `turns`: `turn_order`, `other_media`, `answer_weight` (of the last
answer), `empty_question`, `empty_answer`, `image_tags` (places and images differ in number, or parts and column in what
they name) and `unclear_tags` (`<image>` may be text or a place).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from phi3v.data.cells import Cells, placed_cells
from phi3v.data.columns import ColumnMap, Format, RowOptions, check_image_column
from phi3v.data.json_text import RepeatedKeyError, parse_json
from phi3v.data.schema import ImagePart, ImageRef, Message, Role, Row, TextPart, UnusableRecord
from phi3v.data.templates import Template, Unread, kind_of, known_columns
from phi3v.data.text_guard import MAX_DEPTH, is_too_deep
from phi3v.data.turns import IMAGE_TAG, is_empty, is_trained, part_cells, spoken_turn
from phi3v.errors import DataError

Shape = Literal["messages", "prompt_completion", "conversations"]
SHAPES: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
}
"""Format -> the columns that make a set one of it."""

_MEDIA = ("video", "videos", "audio", "audios")
"""Columns that sets of other models have."""
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
        media: columns of films and sounds, which no row may be about.
        text_only: True where the recipe says that there are no images, so none of a part is read either.
        answered: False for questions: the last turn may be the user's.
    """

    source: str
    shape: Shape
    cells: Cells
    named: tuple[str, ...]
    system: Template | None = None
    chosen: bool = True
    other_images: str | None = None
    text_only: bool = False
    media: tuple[str, ...] = ()
    answered: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, each once."""
        templated = self.system.columns if self.system else ()
        return tuple(dict.fromkeys([*self.named, *templated, *self._image_columns, *self.media]))

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
        return [cell for cell, _ in self._placed(record)]

    def _placed(self, record: Mapping[str, Any]) -> list[tuple[Any, str]]:
        """The image cells with what lines call them. Raises: as `image_cells`."""
        if self.text_only:
            return []
        column = self._column_cells(record)
        parts = [(cell, "an image part") for turn in self._turns(record) for cell in part_cells(turn)]
        named = [placed for placed in parts if not is_empty(placed[0])]
        if not named or not column:
            return column or named
        if any(isinstance(cell, list) for cell, _ in named):
            return named  # no image, which is told as it is without a column
        if len(column) == len(parts) - len(named):
            others = iter(column)
            return [next(others) if is_empty(placed[0]) else placed for placed in parts]
        both = zip(parts, column, strict=False)
        agreed = all(is_empty(cell) or _is_same(cell, other) for (cell, _), (other, _) in both)
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
        images: tuple[ImageRef, ...] = tuple(self.cells.image(*placed) for placed in self._placed(record))
        spoken = [spoken_turn(turn, tagged=self.shape == "conversations") for turn in turns]
        trained = [is_trained(turn) for turn, (role, _) in zip(turns, spoken, strict=True) if role == "assistant"]
        if self.system is not None and spoken[0][0] != "system":
            texts = {column: self.cells.text(column, record.get(column)) for column in self.system.columns}
            spoken.insert(0, ("system", [self.system.render(texts)]))
        _check_order([role for role, _ in spoken], self.answered)
        if not self.chosen and self.shape != "conversations":
            self._check_tags(spoken, len(images))
        self._check_media(record, spoken, len(images))
        messages = _place_images(spoken, len(images))
        return Row(_weighted(messages, trained) if self.answered else messages, images, {}, self.source, index)

    def _column_cells(self, record: Mapping[str, Any]) -> list[tuple[Any, str]]:
        """The cells of the image column; nothing there is no image: None, "" and [] -> []."""
        column = self._filled(record)
        value = None if column is None else record.get(column)
        return [] if is_empty(value) else placed_cells(column, value)

    def _filled(self, record: Mapping[str, Any]) -> str | None:
        """The first image column with something in it: {"image": None, "images": ["a.jpg"]} -> "images"."""
        columns = self._image_columns
        return next((column for column in columns if not is_empty(record.get(column))), self.cells.images)

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
                told = f"column {column!r} holds {kind_of(value)} and no list of turns"
                raise UnusableRecord("conversation_type", told)
            turns += value
        return turns

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

    def _check_media(
        self, record: Mapping[str, Any], spoken: Sequence[tuple[Role, list[str | None]]], images: int
    ) -> None:
        """Raises: UnusableRecord for a conversation about a film or a sound: its tag is there, or it has no image."""
        text = "".join(piece or "" for role, pieces in spoken if role == "user" for piece in pieces)
        tagged = "<video>" in text or "<audio>" in text
        column = next((column for column in self.media if not is_empty(record.get(column))), None)
        if column is not None and (tagged or not images):
            raise UnusableRecord("other_media", f"column {column!r} holds what is neither text nor image")


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
        answer = Template(options.answer, "answer") if options.answered else None
        return ColumnMap(source, cells, Template(options.prompt, "prompt"), answer, system)
    if options.has_templates:
        raise DataError(
            f"data.format {shape} reads whole conversations: take data.prompt and data.answer out ({source})"
        )
    named = SHAPES[shape] if options.answered else SHAPES[shape][:1]
    if shape == "conversations" and _find("conversations", columns) is None and _find("messages", columns):
        named = ("messages",)
    named = tuple(_find(column, columns) or column for column in named)
    images, other = cells.images, None
    if images == "image":  # where nothing is said
        found = [place for name in ("image", "images") if (place := _find(name, columns)) is not None]
        images, other = [*found, None, None][:2]
    chosen, text_only = options.format != "auto", options.images is None
    cells = replace(cells, images=images)
    media = tuple(place for name in _MEDIA if (place := _find(name, columns)) is not None)
    return ConversationMap(source, shape, cells, named, system, chosen, other, text_only, media, options.answered)


def _find(column: str, columns: Sequence[str]) -> str | None:
    """A column under its name, or inside the json member of a webdataset."""
    return next((name for name in (column, _INSIDE_JSON + column) if name in columns), None)


def _is_same(cell: Any, other: Any) -> bool:
    """Whether two image cells are one image: "./a.jpg" and {"bytes": b"...", "path": "a.jpg"}.

    Only "./" is taken off: behind a link "b/../a.jpg" may be another file, and in an address each character counts.
    """
    paths = [one.get("path") if isinstance(one, Mapping) else one for one in (cell, other)]
    names = [path.removeprefix("./") if isinstance(path, str) else None for path in paths]
    return bool(cell == other or (names[0] is not None and names[0] == names[1]))


def _parsed(value: str, column: str) -> Any:
    """A conversation that a CSV or Parquet cell holds as JSON text."""
    if is_too_deep(value):
        raise UnusableRecord("conversation_type", f"column {column!r} nests more than {MAX_DEPTH} lists and mappings")
    try:
        return parse_json(value) if value.strip() else None
    except RepeatedKeyError as error:
        raise UnusableRecord("conversation_type", f"column {column!r} holds JSON in which {error}") from None
    except (ValueError, RecursionError):
        message = f"column {column!r} holds text and no list of turns"
        raise UnusableRecord("conversation_type", message) from None


def _check_order(roles: list[Role], answered: bool) -> None:
    """Raises: UnusableRecord unless, after an optional system turn, user and assistant take turns to the answer, or to
    the question where none is needed.
    """
    turns = roles[1:] if roles[:1] == ["system"] else roles
    wanted = ["user", "assistant"] * (len(turns) // 2) + (["user"] if len(turns) % 2 and not answered else [])
    if not turns or turns != wanted:
        heard = ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
        last = " and the last answers" if answered else ""
        raise UnusableRecord(
            "turn_order", f"the turns are {heard}: after an optional system turn, user and assistant alternate{last}"
        )


def _weighted(messages: tuple[Message, ...], trained: Sequence[bool]) -> tuple[Message, ...]:
    """Messages of which the answers know whether they may be trained. Raises: UnusableRecord where the last may not."""
    if not trained[-1]:
        raise UnusableRecord(
            "answer_weight", "its last answer has the weight 0, so there is nothing to train behind it"
        )
    told = iter(trained)
    return tuple(replace(one, trained=next(told)) if one.role == "assistant" else one for one in messages)


def _place_images(spoken: Sequence[tuple[Role, list[str | None]]], images: int) -> tuple[Message, ...]:
    """Messages with their images in place, each once, in order.

    Example: [("user", [None, "What?"]), ("assistant", ["A hat."])] with 1 image -> the user's parts are (ImagePart(0),
    TextPart("What?")); with [("user", ["What?"]), ...] and 1 image too.
    Raises: UnusableRecord.
    """
    places = sum(piece is None for _, pieces in spoken for piece in pieces)
    leading = images if not places else 0
    if places and places != images:
        raise UnusableRecord("image_tags", f"places for images in its turns: {places}, images: {images}")
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
