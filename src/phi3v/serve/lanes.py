"""Requests that are answered together: a lane for each adapter, and for the base, each with a running batch of its own.

In come prepared requests; out come pieces of text, and the last word about each request. Waiting requests join as soon
as there is room; a request that ends, is cancelled or fails leaves at once. A row that grows beyond the original
context of the rope goes through the model once more as a whole, with the long factors, as `generate` has it. Knows no
pipes, no JSON and no clock.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from phi3v.evaluation.running_batch import IMAGE_PARTS, RunningBatch, RunningRow
from phi3v.evaluation.running_cache import fewest_moves
from phi3v.generate import PieceStreamer
from phi3v.serve.served import Served

Tell = Callable[..., None]
"""Takes messages, those of one step at once."""
_logger = logging.getLogger(__name__)
LEAST_TEMPERATURE = 1e-3
"""Below it logits would leave the range of float32; the likeliest token has all the probability there anyway."""
UNSOUND = "the model's scores are no numbers: its weights, or the adapter's, are damaged or too large for their type"
"""What is said instead of an answer of nothing."""
ROOM = 128
"""Columns for tokens to come that a cache is made with."""


@dataclass
class Asked:
    """A request that is ready for the model.

    Attributes:
        name: its number.
        served: what answers.
        example: the encoded prompt, whose images are pixels or features.
        most: tokens of the answer at most.
        stops: texts that end it.
        choose: how tokens are picked; None for the likeliest.
    """

    name: int
    served: Served
    example: dict[str, Any]
    most: int
    stops: list[str] = field(default_factory=list)
    choose: Callable[[torch.Tensor], int] | None = None

    @classmethod
    def of(cls, message: Mapping[str, Any], served: Served, example: dict[str, Any], most: int) -> "Asked":
        """What a request's message asks of an encoded prompt."""
        choose = sampler(message["temperature"], message["top_p"], message["seed"])
        return cls(message["id"], served, example, most, list(message["stop"]), choose)

    def __post_init__(self) -> None:
        self.row = RunningRow(self.name, self.choose)
        self.text = StoppedText(self.stops)
        chat = self.served.chat
        self._pieces = PieceStreamer(chat.text_of, chat.is_byte, self.text.take)
        self._pieces.put(torch.empty(0))  # which it takes for the prompt
        self._read = 0
        self.prompt_tokens = len(self.example["input_ids"])
        self.ends = chat.stops

    def see(self) -> None:
        """Turns pixels into features, those of images that came before out of memory; once is enough."""
        row = self.example.pop("row", None)
        if row is not None and self.served.seen is not None and "pixel_values" in self.example:
            self.example = self.served.seen.complete(row, self.example)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return self.prompt_tokens + len(self.row.new)

    @property
    def over(self) -> str | None:
        """Why nothing follows: "stop", "length" or "unsound"; None while it goes on."""
        new = self.row.new
        if not self.row.sound:
            return "unsound"
        if self.text.stopped or (new and new[-1] in self.ends):
            return "stop"
        return "length" if len(new) >= self.most else None

    def read(self) -> str:
        """The text that came since the last call and cannot be taken back."""
        for token in self.row.new[self._read :]:
            if token not in self.ends and not self.text.stopped:
                self._pieces.put(torch.tensor([token]))
        self._read = len(self.row.new)
        if self.over is not None:
            self._pieces.end()
            self.text.finish()
        return self.text.give()

    def again(self) -> dict[str, Any]:
        """The example with what was answered so far as a part of the prompt."""
        ids = torch.cat([self.example["input_ids"], torch.tensor(self.row.new)])
        images = {name: self.example[name] for name in IMAGE_PARTS if name in self.example}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


class StoppedText:
    """Text that ends before the first of some stop texts; what may begin one is held back.

    Example: with the stop "END", the pieces "a E" and "Nd" give "a " and "ENd"; "a EN" and "D b" give "a " and "".

    Attributes:
        stopped: whether a stop text came.
    """

    def __init__(self, stops: list[str]) -> None:
        """Nothing came yet."""
        self._stops = stops
        self._held = self._given = ""
        self.stopped = False

    def take(self, piece: str) -> None:
        """More text."""
        if self.stopped:
            return
        self._held += piece
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._given, self._held = self._given + self._held[: min(found)], ""
            return
        keep = max((_begun(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        self._given, self._held = self._given + self._held[:cut], self._held[cut:]

    def finish(self) -> None:
        """Nothing follows: what was held back is text."""
        self._given, self._held = self._given + self._held, ""

    def give(self) -> str:
        """The text that is certain since the last call."""
        given, self._given = self._given, ""
        return given


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop: ("a EN", "END") -> 2."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def sampler(temperature: float, top_p: float, seed: int | None) -> Callable[[torch.Tensor], int] | None:
    """How a request picks its tokens, whatever else is in the batch; None for the likeliest (temperature 0).

    The warpers are those of `generate`; a seed gives the same tokens again.
    """
    if temperature < LEAST_TEMPERATURE:
        return None
    random = torch.Generator()
    random.seed() if seed is None else random.manual_seed(seed % 2**64)
    warm, likely = TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(top_p)

    def choose(logits: torch.Tensor) -> int:
        ids = torch.empty(1, 0, dtype=torch.long)
        scores = likely(ids, warm(ids, logits[None].float().cpu()))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=random))

    return choose


class Lane:
    """The requests to one name."""

    def __init__(self, served: Served, *, batch: int, tokens: int, tell: Tell, name: str = "") -> None:
        """Nothing runs.

        Args:
            served: what answers.
            batch: rows at once.
            tokens: of all rows of the batch at most, each counted as long as the longest; one row may have more.
            tell: takes pieces and last words.
            name: that requests ask for, for the log.
        """
        self.served, self._batch_size, self._most_tokens, self._tell = served, batch, tokens, tell
        self._name, self._was_unsound = name, False
        chat = served.chat
        self.waiting: deque[Asked] = deque()
        self.running: list[Asked] = []
        self._batch = RunningBatch(chat.model, chat.processor, room=ROOM, has_ended=lambda row: False)
        config = chat.model.config
        plain = config.rope_parameters["rope_type"] == "default"
        self._limit = 2**62 if plain else int(config.original_max_position_embeddings)

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self.waiting or self.running)

    def turn(self, cancelled: Callable[[int], bool]) -> None:
        """Lets go what has ended, takes in what waits, and makes one token more of each row."""
        self.waiting = deque(one for one in self.waiting if not cancelled(one.name))
        stays = fewest_moves(
            [
                place
                for place, one in enumerate(self.running)
                if not cancelled(one.name) and one.over is None and not self._crosses(one)
            ]
        )
        crossing = [one for one in self.running if not cancelled(one.name) and one.over is None and self._crosses(one)]
        left = len(stays) != len(self.running)
        self.running = [self.running[place] for place in stays]
        entered = self._next(crossing)
        if entered:
            self._enter(entered, stays)
        elif left:
            self._batch.keep(stays)
        if self._batch.rows and not entered:
            self._batch.step()
            self._report(self.running)

    def fail(self) -> list[int]:
        """Lets everything go after a fault; the numbers of the requests that are lost."""
        lost = [one.name for one in [*self.running, *self.waiting]]
        self.running.clear()
        self.waiting.clear()
        self._batch.rows.clear()
        self._batch.keep([])
        return lost

    def _crosses(self, one: Asked) -> bool:
        """Whether the next token is the first beyond the rope's limit, by which all cached keys change."""
        return one.row.cached == self._limit

    def _next(self, crossing: list[Asked]) -> list[Asked]:
        """Those that go through the model as a whole now: on one side of the rope's limit, as many as there is room."""
        self.waiting.extendleft(reversed(crossing))
        group: list[Asked] = []
        while self.waiting and len(self.running) + len(group) < self._batch_size:
            one = self.waiting[0]
            if group and (one.length == self._limit or (one.length > self._limit) != (group[0].length > self._limit)):
                break
            together = [*self.running, *group, one]
            widest = max(each.prompt_tokens + each.most for each in together)
            if len(together) > 1 and len(together) * widest > self._most_tokens:
                break
            group.append(self.waiting.popleft())
            if one.length == self._limit:  # a batch of several is a column wider than its longest prompt
                break
        return group

    def _enter(self, group: list[Asked], stays: list[int]) -> None:
        """Passes prompts through tower and decoder."""
        self.running += group
        for one in group:
            one.see()
        examples = [one.again() if one.row.new else one.example for one in group]
        self._batch.enter([one.row for one in group], examples, stays)
        self._report(group)

    def _report(self, rows: list[Asked]) -> None:
        """Tells what is new of some rows."""
        told: list[dict[str, Any]] = []
        for one in rows:
            if not one.row.sound:
                self._log_unsound()
                told.append(
                    {"is": "refused", "id": one.name, "status": 500, "code": "model_scores", "message": UNSOUND}
                )
                continue
            piece, reason = one.read(), one.over
            if piece:
                told.append({"is": "piece", "id": one.name, "text": piece})
            if reason is not None:
                done = {"prompt_tokens": one.prompt_tokens, "completion_tokens": len(one.row.new)}
                told.append({"is": "done", "id": one.name, "reason": reason, **done})
        if told:
            self._tell(*told)

    def _log_unsound(self) -> None:
        """Tells who runs the server, whom no response reaches, and once: such a model does so at each request."""
        if not self._was_unsound:
            _logger.error("a request to %s failed: %s; this is said once", self._name, UNSOUND)
        self._was_unsound = True


class Lanes:
    """All lanes of one model, which take turns."""

    def __init__(self, served: Mapping[str, Served], *, batch: int, tokens: int, tell: Tell) -> None:
        """See `Lane`."""
        sizes = {"batch": batch, "tokens": tokens}
        self.lanes = {name: Lane(one, **sizes, tell=tell, name=name) for name, one in served.items()}
        self._tell = tell
        self._selected: Lane | None = None

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return any(lane.busy for lane in self.lanes.values())

    @property
    def rows(self) -> int:
        """Requests that are in the model's hands."""
        return sum(len(lane.running) + len(lane.waiting) for lane in self.lanes.values())

    @torch.inference_mode()
    def turn(self, cancelled: Callable[[int], bool]) -> None:
        """One turn of each lane that has something to do."""
        for lane in self.lanes.values():
            if not lane.busy:
                continue
            if self._selected is not lane:
                lane.served.select()
                self._selected = lane
            try:
                lane.turn(cancelled)
            except Exception:  # out of memory, mostly: these requests are lost, the server is not
                _logger.exception("a step failed")
                self._tell(*({"is": "fault", "id": name} for name in lane.fail()))
