"""Conversations that a model and its base answer side by side, from one model in memory.

In come questions, photos that were uploaded, and a ChatModel; out come turns that grow while they are answered, the
costs in tokens, and photos as the model sees them. The base answers with the adapter switched off, so one answer is
made at a time, whoever asks. Knows no page and no server.
"""

import contextlib
import queue
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from phi3v.adapters import base_weights, has_adapter, holds_base
from phi3v.data.data_uri import photo_jpeg
from phi3v.data.encode import encode_prompt
from phi3v.data.images import content_digest, open_image
from phi3v.data.lengths import RowLength, row_lengths
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, RowProblem, TextPart
from phi3v.data.show import shown_images
from phi3v.data.show_page import render_images
from phi3v.errors import DataError, DeviceError, ImageError, TooLongError
from phi3v.generate import ChatModel

TUNED, BASE = "tuned", "base"
MAX_PHOTOS = 16
"""Photos of one conversation at most: what is decoded and held for it stays bounded."""
MAX_FILE = 20_000_000
"""Bytes of a photo's file at most."""
MAX_CHARACTERS = 1_000_000
"""Of a question; the longest context holds fewer, and a tokenizer takes seconds for more."""
_NOT_HERE = (" or raise image.max_pixels (--max-pixels of ask and predict)", " or raise num_crops")
"""Ways out that errors of photos name and a page does not have."""
SHOWN_SIDE = 512  # pixels of the longer side of a photo in the conversation


@dataclass(frozen=True)
class Photo:
    """An uploaded photo that can be used.

    Attributes:
        image: its name and the encoded file.
        tokens: what it costs.
        thumbnail: a small JPEG of it, made here, so that nothing uploaded is shown as it came.
        digest: of the file.
    """

    image: ImageRef
    tokens: int
    thumbnail: bytes = field(repr=False)
    digest: str

    @property
    def name(self) -> str:
        """What it was called."""
        return self.image.path or ""


@dataclass(frozen=True)
class Turn:
    """A question and what each column answers.

    Example: `Turn("What is it?", (photo,), {"tuned": "Product: Scarf", "base": "A sc"}, answering="base")` while the
    base is at it. One that was stopped keeps what there is.

    Attributes:
        question: the text.
        photos: the photos that come with it.
        answers: column -> its answer so far.
        answering: the column that is being answered, None once it is over.
    """

    question: str
    photos: tuple[Photo, ...]
    answers: Mapping[str, str]
    answering: str | None = None


@dataclass(frozen=True)
class Settings:
    """How answers are made: their longest length in tokens; 0 takes the likeliest token, more draws among them."""

    max_new_tokens: int = 256
    temperature: float = 0.0

    @property
    def generation(self) -> dict[str, Any]:
        """Options of transformers' GenerationConfig."""
        return {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {}


class SideBySide:
    """One model that answers conversations in one column, or in two where its base is below its adapter.

    Attributes:
        columns: ("tuned", "base"), or ("tuned",) where there is no base to show.
        context: tokens of a conversation at most, answer included.
        why_alone: why an adapter's base cannot be shown; None where it is, or where there is no adapter.
    """

    def __init__(self, model: ChatModel) -> None:
        """Keep the model, which nobody else may use from now on."""
        self._model = model
        self._turn = threading.Lock()
        both = holds_base(model.model)
        self.columns: tuple[str, ...] = (TUNED, BASE) if both else (TUNED,)
        self.context = int(model.model.config.max_position_embeddings)
        self.why_alone = (
            None
            if both or not has_adapter(model.model)
            else "this kind of adapter does not hold its base, see evaluate"
        )

    def take(self, name: str, data: bytes) -> Photo:
        """A photo from what was uploaded. Raises: ImageError in one line that names it and nothing of this machine."""
        if len(data) > MAX_FILE:
            raise ImageError(f"image {name} has {len(data):,} bytes, more than the limit of {MAX_FILE:,}; shrink it")
        image = ImageRef(name, data=data)
        where = ""  # what opens a photo names it, what counts its crops does not
        try:
            opened = open_image(image)
            where = f"image {name}: "
            tokens = self._model.processor.calc_num_image_tokens_from_image_size(*opened.size)
        except ImageError as error:
            line = str(error)
            for way in _NOT_HERE:
                line = line.removesuffix(way)
            raise ImageError(f"{where}{line}") from error
        return Photo(replace(image, size=opened.size), tokens, photo_jpeg(opened, SHOWN_SIDE), content_digest(image))

    def seen(self, photos: Sequence[Photo]) -> str:
        """Photos as the model sees them, with crops and tokens, as HTML in which nothing of them is markup."""
        shown = []
        for photo in photos:  # one at a time: 16 crops of each are much
            row = _row((), TUNED, Turn("", (photo,), {}), None)
            encoded = encode_prompt(row, self._model.processor)
            shown += shown_images(row, [open_image(photo.image)], encoded, self._model.processor)
        return render_images(shown)

    def costs(self, turns: Sequence[Turn], question: str, photos: Sequence[Photo]) -> dict[str, RowLength]:
        """What a conversation with this question costs in each column, from text and known sizes alone.

        Raises: DataError for text that no tokenizer reads, and for more of it than any context holds.
        """
        if len(question) > MAX_CHARACTERS:
            raise DataError(f"the question has {len(question):,} characters, more than {MAX_CHARACTERS:,}: shorten it")
        asked = Turn(question, tuple(photos), {})
        rows = [_row(turns, column, asked, self._model.system) for column in self.columns]
        found: dict[str, RowLength] = {}
        for column, length in zip(self.columns, row_lengths(rows, self._model.processor, train_on=None), strict=True):
            if isinstance(length, RowProblem):
                raise DataError(f"the conversation {length.message}")
            found[column] = length
        return found

    def check(
        self, turns: Sequence[Turn], question: str, photos: Sequence[Photo], settings: Settings
    ) -> dict[str, RowLength]:
        """The costs of a question that can be answered.

        Raises: DataError in one line: nothing is asked, too many photos, or a conversation beyond the context.
        """
        if not question.strip():
            raise DataError("there is no question: write one, then send it")
        count = sum(len(turn.photos) for turn in turns) + len(photos)
        if count > MAX_PHOTOS:
            raise DataError(
                f"the conversation would have {count} photos, and the limit is {MAX_PHOTOS}: clear it, or send fewer"
            )
        costs = self.costs(turns, question, photos)
        longest = max(length.total for length in costs.values())
        if longest + settings.max_new_tokens > self.context:
            raise TooLongError(
                f"the conversation would have {longest:,} tokens, {settings.max_new_tokens:,} more are kept for the "
                f"answer, and the model's context is {self.context:,}: clear it, send fewer photos, or lower the "
                "longest answer"
            )
        return costs

    def answer(
        self, turns: Sequence[Turn], question: str, photos: Sequence[Photo], settings: Settings
    ) -> Generator[Turn, None, None]:
        """The next turn, again and again as its answers grow, column by column. Closing the iterator ends the work.

        Raises: DataError as `check`, before anything is answered; DeviceError where memory does not suffice.
        """
        self.check(turns, question, photos, settings)
        turn = Turn(question, tuple(photos), {})
        for column in self.columns:
            turn = replace(turn, answers={**turn.answers, column: ""}, answering=column)
            yield turn
            row = _row(turns, column, turn, self._model.system)
            with contextlib.closing(self._pieces(row, column, settings)) as pieces:
                for piece in pieces:
                    turn = replace(turn, answers={**turn.answers, column: turn.answers[column] + piece})
                    yield turn
        yield replace(turn, answering=None)

    def _pieces(self, row: Row, column: str, settings: Settings) -> Generator[str, None, None]:
        """The answer to a row, piece by piece, made in a thread that has ended when this has."""
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        stopped = threading.Event()

        def receive(piece: str) -> None:
            if stopped.is_set():
                raise _Stopped
            pieces.put(piece)

        def work() -> None:
            try:
                self._work(row, column, settings, receive)
                pieces.put(None)
            except BaseException as error:  # raised where the pieces are read
                pieces.put(error)

        thread = threading.Thread(target=work, name=f"answer of {column}", daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, torch.OutOfMemoryError):
                    raise DeviceError(
                        "the device has not enough memory for this conversation: clear it, or send fewer photos"
                    ) from piece
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            stopped.set()
            thread.join()

    def _work(self, row: Row, column: str, settings: Settings, receive: Any) -> None:
        """Answers a row with the weights of its column; nobody else answers meanwhile."""
        weights = base_weights(self._model.model) if column == BASE else contextlib.nullcontext()
        example = encode_prompt(row, self._model.processor)
        with self._turn, weights:
            self._model.answer_one(
                example, max_new_tokens=settings.max_new_tokens, stream=receive, **settings.generation
            )


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


def _row(turns: Sequence[Turn], column: str, asked: Turn, system: str | None) -> Row:
    """A conversation as one column had it, up to the new question.

    Example: one earlier turn with a photo gives the messages user (photo, text), assistant, user.
    """
    messages = [Message("system", (TextPart(system),))] if system else []
    images: list[ImageRef] = []
    for turn in (*turns, asked):
        places = [ImagePart(len(images) + number) for number in range(len(turn.photos))]
        images += [photo.image for photo in turn.photos]
        messages.append(Message("user", (*places, TextPart(turn.question))))
        if turn is not asked:
            messages.append(Message("assistant", (TextPart(turn.answers.get(column, "")),)))
    return Row(tuple(messages), tuple(images), {}, "the conversation", 0)
