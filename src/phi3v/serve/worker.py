"""The process that owns the model: requests come in through a pipe, pieces of answers go out through another one.

`python -m phi3v.serve.worker` reads messages of `channel` from standard input: first what to serve, then requests and
cancellations. It answers on what was standard output, which everything else that is written finds closed to it. A
thread reads, one prepares (decoding, resizing, tokenising, on a CPU the tower too) or has a process beside this one
prepare, and the main thread runs the model. It ends when the server does. Knows no HTTP.
"""

import contextlib
import logging
import os
import queue
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from phi3v.data.quiet_tiff import silence_libtiff
from phi3v.errors import Phi3VError
from phi3v.hub_attempt import give_up_early
from phi3v.serve.beside import Beside, Ended, may_fork
from phi3v.serve.channel import Message, read_message, write_message
from phi3v.serve.lanes import Asked, Lanes
from phi3v.serve.limits import Limits
from phi3v.serve.prepare import prepare
from phi3v.serve.protocol import Refusal
from phi3v.serve.served import Served, load_served

_logger = logging.getLogger(__name__)
_TOKENS_A_ROW = 4096
"""Of a running batch, on average; longer rows share it with fewer."""
SWITCH_SECONDS = 1e-4
"""After which a thread lets another one run. With Python's 5 ms the one that runs the model waited that long for the
one that prepares requests each time that it had sent something: an eighth of the requests
a second at 8 clients on two cores that had other work too; on quiet ones no difference was seen."""


class Worker:
    """Answers what comes through `source` and tells it through `drain`, until `source` ends.

    Args:
        served: names, and what answers.
        limits: sizes of batches and contexts.
        source: requests and cancellations.
        drain: pieces and last words.
    """

    def __init__(self, served: Mapping[str, Served], limits: Limits, source: BinaryIO, drain: BinaryIO) -> None:
        """Nothing is read yet."""
        self.served, self.limits, self._source, self._drain = served, limits, source, drain
        self.context = context_of(next(iter(served.values())).chat.model.config, limits)
        tokens = max(self.context, limits.batch * _TOKENS_A_ROW)
        self.lanes = Lanes(served, batch=limits.batch, tokens=tokens, tell=self.tell)
        self._lock = threading.Lock()
        self._raw: queue.SimpleQueue[tuple[Message, list[bytes]] | None] = queue.SimpleQueue()
        self._ready: queue.Queue[Asked | None] = queue.Queue(maxsize=limits.batch)
        self._wanted: set[int] = set()  # requests that were neither answered nor cancelled
        self._told_rows = 0
        self._beside: Beside | None = None

    def tell(self, *messages: Message) -> None:
        """Sends messages to the server, all at once: each time that it is woken costs as much as a layer's step."""
        self._wanted.difference_update(one["id"] for one in messages if one["is"] in ("done", "fault", "refused"))
        with self._lock:
            for message in messages:
                write_message(self._drain, message, flush=False)
            self._drain.flush()

    def run(self) -> None:
        """Says that it is ready, and works until there is nobody to work for."""
        names = [{"id": name, "adapter": one.adapter is not None} for name, one in self.served.items()]
        self.tell({"is": "ready", "models": names, "context": self.context})
        if all(one.sees_ahead for one in self.served.values()) and may_fork():
            self._beside = Beside(self.served, self._ready_for_the_model, (self._source, self._drain))
            threading.Thread(target=self._end_with, args=(self._beside,), daemon=True).start()
        for job in (self._read, self._prepare):
            threading.Thread(target=job, daemon=True, name=job.__name__).start()
        open_ = True
        while open_ or self.lanes.busy:
            open_ = self._take_in(wait=not self.lanes.busy) and open_
            self.lanes.turn(lambda name: name not in self._wanted)
            if self.lanes.rows != self._told_rows:
                self._told_rows = self.lanes.rows
                self.tell({"is": "rows", "rows": self._told_rows})
        if self._beside is not None:
            self._beside.close()

    def _take_in(self, *, wait: bool) -> bool:
        """Puts prepared requests into their lanes, whose pixels take memory: as many as a batch has rows, no more.

        Returns: False once no more will come.
        """
        while sum(len(lane.waiting) for lane in self.lanes.lanes.values()) < self.limits.batch:
            try:
                one = self._ready.get(block=wait)
            except queue.Empty:
                return True
            if one is None:
                return False
            wait = False
            lane = next(lane for lane in self.lanes.lanes.values() if lane.served is one.served)
            lane.waiting.append(one)
        return True

    def _read(self) -> None:
        """What the thread does that reads: cancellations count at once, requests are prepared in their turn."""
        while (found := read_message(self._source)) is not None:
            message, images = found
            if message["do"] == "cancel":
                self._wanted.discard(message["id"])
            else:
                self._wanted.add(message["id"])
                self._raw.put((message, images))
        self._wanted.clear()
        self._raw.put(None)

    def _prepare(self) -> None:
        """What the thread does that prepares, one request at a time."""
        while (found := self._raw.get()) is not None:
            message, images = found
            if message["id"] not in self._wanted:
                continue
            make = self._ready_for_the_model if self._beside is None else self._beside.prepare
            try:
                asked = make(message, images)
            except Refusal as error:
                told = {"status": error.status, "code": error.code, "message": str(error)}
                self.tell({"is": "refused", "id": message["id"], **told})
            except Ended:
                return  # and so does this process, see _end_with
            except Exception:  # a fault of ours: this request is lost, the others are not
                _logger.exception("a request could not be prepared")
                self.tell({"is": "fault", "id": message["id"]})
            else:
                self._ready.put(asked)
        self._ready.put(None)

    def _end_with(self, beside: Beside) -> None:
        """What the thread does that waits for the process beside: where that dies, even idle, this one ends at once."""
        if beside.dies():
            _logger.error("the process that prepares requests ended")
            os._exit(1)

    def _ready_for_the_model(self, message: Message, images: Sequence[bytes]) -> Asked:
        """A request, prepared here. Raises: Refusal."""
        asked = prepare(
            message,
            images,
            self.served[message["model"]],
            context=self.context,
            default_tokens=self.limits.default_tokens,
        )
        if asked.served.sees_ahead:
            asked.see()
        return asked


def context_of(config: Any, limits: Limits) -> int:
    """Tokens of prompt and answer at most: what the model has, less where the limits say so.

    Example: of 131,072 tokens 32,768 are served unless the limits name more; a sliding window is never reached.
    """
    most = int(config.max_position_embeddings)
    if config.sliding_window is not None:
        most = min(most, int(config.sliding_window) - 1)
    return min(most, limits.context or limits.longest_context)


def main() -> None:
    """The process: standard input and output are the server's, and nobody else writes there."""
    source, drain = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.setswitchinterval(SWITCH_SECONDS)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="phi3v: %(message)s")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    silence_libtiff()
    give_up_early()  # a hub that is away: one attempt and one line, as in the commands
    first = read_message(source)
    if first is None:
        return
    given, _ = first
    try:
        served = load_served(given["target"], given["adapters"], device=given["device"], dtype=given["dtype"])
        worker = Worker(served, Limits(**given["limits"]), source, drain)
    except Phi3VError as error:
        write_message(drain, {"is": "failed", "line": str(error)})
        return
    with contextlib.suppress(BrokenPipeError):
        worker.run()


if __name__ == "__main__":
    main()
