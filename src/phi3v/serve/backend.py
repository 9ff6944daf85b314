"""The worker as the server sees it: requests go in, events come out, and a worker that dies is started again.

Lives in the server's event loop; a thread reads what the worker says. Workers come out of a `nursery`, which has
imported everything: a new one only loads the model. Knows no HTTP and no model.
"""

import asyncio
import dataclasses
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import IO, Any

from phi3v.errors import CheckpointError, Phi3VError
from phi3v.serve.channel import Message, read_message, write_message
from phi3v.serve.limits import Limits
from phi3v.serve.nursery import Nursery
from phi3v.serve.protocol import Refusal

_logger = logging.getLogger(__name__)
_LAST = ("done", "fault", "refused", "lost")


class Answer:
    """One request on its way: an iterator of its events, up to the last one.

    Events are the worker's messages: {"is": "piece", "text": ...} and, last, {"is": "done", "reason": ...,
    "prompt_tokens": ..., "completion_tokens": ...}; whatever else ends it is a `Refusal`.
    """

    def __init__(self, backend: "Backend", number: int) -> None:
        """Begin to listen."""
        self._backend, self.number = backend, number
        self.events: asyncio.Queue[Message] = asyncio.Queue()
        self._over = False

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        if self._over:
            raise StopAsyncIteration
        event = await self.events.get()
        self._over = event["is"] in _LAST
        if event["is"] == "refused":
            raise Refusal(event["status"], event["code"], event["message"])
        if event["is"] == "lost":
            raise Refusal(503, "worker_lost", "the worker ended and is started again: try again", retry_after=10)
        if event["is"] == "fault":
            raise Refusal(500, "server_error", "this request could not be answered")
        return event

    def close(self) -> None:
        """Nobody listens any more: the worker lets the request go, if it has not ended."""
        self._backend.forget(self.number, cancel=not self._over)
        self._over = True


class Backend:
    """A worker process, and the requests that it has.

    Attributes:
        models: names that can be asked, as the worker told them, the TARGET's own first.
        context: tokens of prompt and answer at most.
        ready: whether a worker is there that has loaded everything.
        rows: requests that the worker's model holds.
    """

    def __init__(self, first: Message, limits: Limits) -> None:
        """Nothing is started.

        Args:
            first: what a worker is told first: target, adapters, device, dtype.
            limits: of the server.
        """
        self._first = {**first, "limits": dataclasses.asdict(limits)}
        self._limits = limits
        self._numbers = itertools.count(1)
        self._answers: dict[int, Answer] = {}
        self.models: list[dict[str, Any]] = []
        self.context = 0
        self.ready, self.rows = False, 0
        self._nursery = Nursery()
        self._outbox: queue.SimpleQueue[tuple[Message, Sequence[bytes]] | None] = queue.SimpleQueue()
        self._keeper: asyncio.Task[None] | None = None
        self._first_ready: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Starts a worker and waits until it is ready. Raises: CheckpointError with what it says where it fails."""
        self._first_ready = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep())
        await asyncio.shield(self._first_ready)

    async def stop(self) -> None:
        """Ends the worker and waits for that."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await asyncio.to_thread(self._nursery.stop)

    def submit(self, message: Mapping[str, Any], images: Sequence[bytes]) -> Answer:
        """Hands a request to the worker. Raises: Refusal with status 503 where there is none."""
        if not self.ready:
            raise Refusal(503, "not_ready", "the model is being loaded: try again", retry_after=5)
        number = next(self._numbers)
        answer = self._answers[number] = Answer(self, number)
        self._outbox.put(({**message, "do": "answer", "id": number}, images))
        return answer

    def forget(self, number: int, *, cancel: bool) -> None:
        """Drops a request that nobody waits for."""
        if self._answers.pop(number, None) is not None and cancel and self.ready:
            self._outbox.put(({"do": "cancel", "id": number}, ()))

    async def _keep(self) -> None:
        """Starts a worker, and another one whenever it ends."""
        assert self._first_ready is not None
        failures = 0
        while True:
            was_ready, line = await self._one_worker()
            failures = 0 if was_ready else failures + 1
            if not self._first_ready.done():
                words = line or "the worker ended while it loaded the model, without a word"
                self._first_ready.set_exception(CheckpointError(words) if line else Phi3VError(words))
                return
            _logger.error("the worker ended%s; it is started again", f": {line}" if line else "")
            if failures:
                await asyncio.sleep(min(30, 2**failures))

    async def _one_worker(self) -> tuple[bool, str]:
        """The life of a worker. Returns: whether it was ready once, and what it said when it failed."""
        loop = asyncio.get_running_loop()
        to_worker, from_worker = self._nursery.worker()
        self._outbox = queue.SimpleQueue()
        self._outbox.put((self._first, ()))
        said: asyncio.Queue[Message | None] = asyncio.Queue()
        for job in ((_send, self._outbox, to_worker), (_hear, from_worker, loop, said)):
            threading.Thread(target=job[0], args=job[1:], daemon=True).start()
        was_ready, line = False, ""
        try:
            while (message := await said.get()) is not None:
                if message["is"] == "failed":
                    line = message["line"]
                elif message["is"] == "ready":
                    self._begin(message)
                    was_ready = True
                else:
                    self._deliver(message)
        finally:
            self.ready, self.rows = False, 0
            self._outbox.put(None)
            for answer in list(self._answers.values()):
                answer.events.put_nowait({"is": "lost"})
            self._answers.clear()
        return was_ready, line

    def _begin(self, message: Message) -> None:
        """A worker is ready."""
        assert self._first_ready is not None
        self.models, self.context, self.ready = message["models"], message["context"], True
        if not self._first_ready.done():
            self._first_ready.set_result(None)

    def _deliver(self, message: Message) -> None:
        """An event for whom it concerns; nobody where the request was given up."""
        if message["is"] == "rows":
            self.rows = message["rows"]
            return
        answer = self._answers.get(message["id"])
        if answer is not None:
            answer.events.put_nowait(message)


def _send(outbox: "queue.SimpleQueue[tuple[Message, Sequence[bytes]] | None]", stream: IO[bytes]) -> None:
    """What the thread does that writes to a worker."""
    try:
        while (one := outbox.get()) is not None:
            write_message(stream, *one)
        stream.close()
    except (OSError, ValueError):
        return  # the worker is gone, which the other thread finds out


def _hear(stream: IO[bytes], loop: asyncio.AbstractEventLoop, said: "asyncio.Queue[Message | None]") -> None:
    """What the thread does that reads from a worker."""
    while True:
        found = read_message(stream)
        try:
            loop.call_soon_threadsafe(said.put_nowait, None if found is None else found[0])
        except RuntimeError:
            return  # the loop was closed: the server has ended
        if found is None:
            return
