"""The answers of one model to many rows, and its loss on what should have been answered.

In come a loaded model, its processor and rows; out come texts in the order of the rows, and for each row the loss of
the expected answer. Rows are worked in windows of fixed size, each sorted by length and answered in one running batch
(`engine`), so that what is computed together depends on the rows alone: not on where an earlier start was killed, nor
on how many processes share the windows. A few examples are in memory at a time; each image goes through the tower once.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from phi3v.data.encode import encode, encode_prompt
from phi3v.data.images import MAX_PIXELS
from phi3v.data.lengths import RowLength, row_lengths
from phi3v.data.schema import ImageRef, Row, TrainOn
from phi3v.data.stand_ins import reason_code_of
from phi3v.errors import DataError
from phi3v.evaluation.engine import Answered, Engine
from phi3v.evaluation.journal import Journal
from phi3v.features.vision import PIXELS, images_of
from phi3v.generate import ChatModel
from phi3v.machine import most_memory
from phi3v.ranks import ALONE, Ranks

BATCHES_A_WINDOW = 8
"""Rows of a window, in batches."""
REMEMBERED_BYTES = 128 * 2**20
"""Of features of images that came last: some ten photos of Phi-3.5-Vision."""
Example = dict[str, Any]
See = Callable[[Example], Example] | None


@dataclass(frozen=True)
class Answers:
    """What a model said, row by row.

    Attributes:
        texts: one answer per row, in order; "" for a row that could not be answered.
        losses: of each row the loss summed over the trained tokens of the expected answer.
        tokens: how many these are.
        ways: how many rows were answered in which way, see `engine.Answered`.
        problems: place of a row -> why it could not be answered.
        reasons: the same -> one word for it, "image_unreadable" for instance.
        ended: of each row whether the model ended its answer, and not the limit of new tokens; None where that is not
            known.
    """

    texts: list[str]
    losses: list[float]
    tokens: list[int]
    ways: dict[str, int] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    ended: list[bool | None] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """Mean loss per trained token of the expected answers; None when there was no trained token."""
        return math.fsum(self.losses) / sum(self.tokens) if sum(self.tokens) else None

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Answers:
        """From the records of all rows, see `Windows.answered`."""
        return cls(
            [one["text"] for one in records],
            [math.nan if one["loss"] is None else one["loss"] for one in records],
            [one["tokens"] for one in records],
            dict(Counter(one["way"] for one in records if one["way"] is not None)),
            {place: one["problem"] for place, one in enumerate(records) if one.get("problem") is not None},
            [one.get("ended") for one in records],
            {place: one["reason_code"] for place, one in enumerate(records) if one.get("reason_code") is not None},
        )


def answer_rows(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_new_tokens: int,
    max_pixels: int = MAX_PIXELS,
    see: See = None,
    on_row: Callable[[int], None] = lambda done: None,
    expected: bool = True,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> Answers:
    """Answers every row greedily.

    Args:
        model: a Phi-3-V, with an adapter or without.
        processor: its processor.
        rows: the rows; the last turn of each is what should be answered.
        batch_size: rows that are answered at once.
        max_new_tokens: tokens of an answer at most.
        max_pixels: images with more pixels are refused.
        see: puts features in place of all pixels of an example, where features are kept; the pixels have the form that
            they have in training, by which features are named.
        on_row: called with the number of rows done.
        expected: whether rows hold what should be answered, whose loss is computed. False answers questions; what is
            wrong with one is its own problem then, and ends nothing.
        journal: keeps each window that is done, and gives those that an earlier start did; None keeps nothing.
        ranks: processes that share the windows; all of them get all answers, the first one writes the journal.
    """
    window = _Window(ChatModel(model, processor), rows, batch_size, max_new_tokens, max_pixels, see, expected)
    size = BATCHES_A_WINDOW * batch_size
    spans = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    known = ranks.share([[number, its] for number, its in journal.windows.items()] if journal else [])
    done: dict[int, list[dict[str, Any]]] = {
        number: its for number, its in known if number < len(spans) and len(its) == len(spans[number])
    }
    todo = [number for number in range(len(spans)) if number not in done]
    for first in range(0, len(todo), ranks.count):
        together = todo[first : first + ranks.count]
        before = sum(map(len, done.values()))
        on_row(before)
        mine = together[ranks.rank] if ranks.rank < len(together) else None
        with _kept_said(journal, before, len(rows)), ranks.together():
            its = _told(window.answered(spans[mine]), len(spans[mine]), before, on_row) if mine is not None else []
        for number, found, memory in ranks.gathered([mine, its, most_memory()]):
            if number is not None:
                done[number] = found
                if journal is not None and ranks.first:
                    journal.append(number, found, memory)
    on_row(len(rows))
    return Answers.of([record for number in sorted(done) for record in done[number]])


@contextmanager
def _kept_said(journal: Journal | None, kept: int, total: int) -> Iterator[None]:
    """An interruption says what is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        if journal is not None:
            error.add_note(f"{kept} of {total} rows are answered and kept, and the same command again goes on there")
        raise


def _told(
    found: Iterator[tuple[int, dict[str, Any]]], count: int, before: int, on_row: Callable[[int], None]
) -> list[dict[str, Any]]:
    """The records of a window in the order of its rows; each is told of when it is known."""
    records: dict[int, dict[str, Any]] = {}
    for place, record in found:
        records[place] = record
        on_row(before + len(records))
    return [records[place] for place in range(count)]


@dataclass
class _Window:
    """How the rows of a window are answered; the attributes are the arguments of `answer_rows`."""

    chat: ChatModel
    rows: Sequence[Row]
    batch_size: int
    max_new_tokens: int
    max_pixels: int
    see: See
    expected: bool

    def __post_init__(self) -> None:
        self.engine = Engine(self.chat, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        images = self.chat.processor.image_processor
        apart = self.see is not None or not isinstance(self.chat.model, FSDPModule)  # which computes as a whole
        self.byte_crops = apart and images.normalises_as_clip
        self.recent = RecentImages(self.chat.model) if apart and self.see is None else None

    def answered(self, span: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """The records of some rows, each with its place in the span, as they become known.

        Example: {"text": "A hat.", "loss": 2.5, "tokens": 4, "way": "together", "ended": true}; of a question that
        cannot be asked {"text": "", "loss": 0.0, "tokens": 0, "way": None, "problem": "image a.jpg does not exist",
        "reason_code": "image_unreadable"}.
        """
        order = self._longest_first(span)
        problems: dict[int, DataError] = {}
        for place, found in self.engine.answer(self._examples(span, order, problems)):
            yield place, _record(found)
        for place, error in problems.items():
            told = {"problem": str(error), "reason_code": reason_code_of(error)}
            yield place, {"text": "", "loss": 0.0, "tokens": 0, "way": None, **told}

    def _longest_first(self, span: range) -> list[int]:
        """Places in the span by the length of their rows: 3, 9 and 5 tokens -> [1, 2, 0]."""
        trained: TrainOn | None = "last_assistant" if self.expected else None
        rows = self.rows[span.start : span.stop]
        found = row_lengths(rows, self.chat.processor, train_on=trained, max_pixels=self.max_pixels)
        lengths = [one.total if isinstance(one, RowLength) else 0 for one in found]
        return sorted(range(len(lengths)), key=lambda place: -lengths[place])

    def _examples(
        self, span: range, order: Sequence[int], problems: dict[int, DataError]
    ) -> Iterator[tuple[int, Example]]:
        """Examples in this order; a thread makes the next ones while the model answers."""
        ready: deque[tuple[int, Future[tuple[Row, Example]]]] = deque()
        with ThreadPoolExecutor(1) as pool:
            try:
                for place in order:
                    ready.append((place, pool.submit(self._encoded, span[place])))
                    if len(ready) > self.batch_size:
                        yield from self._seen(*ready.popleft(), problems)
                while ready:
                    yield from self._seen(*ready.popleft(), problems)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _encoded(self, at: int) -> tuple[Row, Example]:
        """A row with its example."""
        row = self.rows[at]
        how: dict[str, Any] = {"max_pixels": self.max_pixels, "byte_crops": self.byte_crops}
        return row, (encode if self.expected else encode_prompt)(row, self.chat.processor, **how)

    def _seen(
        self, place: int, made: Future[tuple[Row, Example]], problems: dict[int, DataError]
    ) -> Iterator[tuple[int, Example]]:
        """An example with features of its images; none for a question with a problem."""
        try:
            row, example = made.result()
        except DataError as error:
            if self.expected:
                raise
            problems[place] = error
            return
        if self.see is not None:
            example = self.see(example)
        elif self.recent is not None:
            example = self.recent.complete(row, example)
        yield place, example


def _record(found: Answered) -> dict[str, Any]:
    """An answer as plain values; a loss that is no number is null, as in all JSON here."""
    loss = found.loss if math.isfinite(found.loss) else None
    return {"text": found.text, "loss": loss, "tokens": found.tokens, "way": found.way, "ended": found.ended}


class RecentImages:
    """The images that came last, as features: several questions about one photo look at it once.

    Attributes:
        computed: images that went through the tower.
    """

    def __init__(self, model: Any, limit_bytes: int = REMEMBERED_BYTES) -> None:
        """Remember nothing yet.

        Args:
            model: a Phi-3-V, with an adapter or without, which stays as it is.
            limit_bytes: of features that are kept, on the model's device.
        """
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.limit_bytes = limit_bytes
        self.computed = 0
        self._features: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()

    @torch.inference_mode()
    def complete(self, row: Row, example: Example) -> Example:
        """An example of a row with features in place of all pixels."""
        if "pixel_values" not in example:
            return example
        found = []
        for image, picture in zip(row.images, images_of(example), strict=True):
            name = _image_name(image)
            features = self._features.pop(name, None)
            if features is None:
                self.computed += 1
                pixels = {part: tensor.to(self.model.device) for part, tensor in picture.parts.items()}
                output = self.model.get_image_features(**pixels, image_sizes=torch.tensor([picture.size]))
                features = output.last_hidden_state
            self._features[name] = features
            found.append(features)
        while sum(one.nbytes for one in self._features.values()) > self.limit_bytes and len(self._features) > 1:
            self._features.popitem(last=False)
        rest = {key: value for key, value in example.items() if key not in PIXELS}
        return {**rest, "image_features": torch.cat(found)}


def _image_name(image: ImageRef) -> tuple[Any, ...]:
    """What tells one image from another: its place, and a hash of what the row holds of it."""
    content = None if image.data is None else blake2b(image.data, digest_size=16).digest()
    return image.path, image.root, image.url, content
