"""A process beside the worker's that prepares its requests: decoding, resizing, tokenising, the tower.

The worker's threads hold Python's lock by turns: with a thread that prepares, each step of the tiny model took 5.7 ms
for 3.0, beside a process 3.0. The process is a fork of the worker once the model is loaded, so that it has the weights
without a copy. A fork may not compute with several threads once its parent has (OpenMP's pool does not come along), so
there is one where torch has one thread, and on Linux; elsewhere the worker's own thread prepares.

Requests go in and prepared ones come out through two pipes, as messages of `channel`; tensors as safetensors. Where
the process dies, by a file that crashes a decoder, the worker ends with it, at work or not, and the server starts
another one; where the worker dies, the process does.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import safetensors.torch
import torch

from phi3v.serve.channel import Message, read_message, write_message
from phi3v.serve.families import end_with_parent
from phi3v.serve.lanes import Asked
from phi3v.serve.protocol import Refusal
from phi3v.serve.served import Served

_logger = logging.getLogger(__name__)
Prepare = Callable[[Message, Sequence[bytes]], Asked]
"""Makes a request ready for the model. Raises: Refusal."""


class Ended(Exception):
    """The process is gone."""


def may_fork() -> bool:
    """Whether a fork of this process can compute as it does."""
    return sys.platform == "linux" and torch.get_num_threads() == 1


class Beside:
    """The process, from the side of the worker, whose thread waits for one request at a time.

    Attributes:
        process: what was forked.
    """

    def __init__(self, served: Mapping[str, Served], prepare: Prepare, not_its: Sequence[BinaryIO]) -> None:
        """Forks. There must be no other thread yet.

        Args:
            served: what answers.
            prepare: what the process does with each request.
            not_its: files that are the worker's alone: who waits for their end must not wait for this process.
        """
        self._served, self._closed = served, False
        (asks, self._asking), (self._answering, answers) = _pipe(), _pipe()
        mine, its = (self._asking, self._answering), (asks, answers)
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(*its, prepare, (*mine, *not_its), os.getpid()), daemon=True, name="prepares"
        )
        self.process.start()
        for one in its:
            one.close()

    def close(self) -> None:
        """Nothing will be asked any more: the process ends, as it does when the worker is killed."""
        self._closed = True
        for one in (self._asking, self._answering):
            one.close()
        self.process.join()

    def dies(self) -> bool:
        """Waits until the process has ended. Returns: whether nobody had closed it."""
        multiprocessing.connection.wait([self.process.sentinel])
        return not self._closed

    def prepare(self, message: Message, images: Sequence[bytes]) -> Asked:
        """A request that is ready for the model. Raises: Refusal; RuntimeError by a fault of ours; Ended."""
        try:
            write_message(self._asking, message, images)
            found = read_message(self._answering)
        except OSError as error:
            raise Ended from error
        if found is None:
            raise Ended
        told, tensors = found
        if told["is"] == "refused":
            raise Refusal(told["status"], told["code"], told["message"])
        if told["is"] == "fault":
            raise RuntimeError("the process that prepares requests tells why")
        return Asked.of(message, self._served[message["model"]], safetensors.torch.load(tensors[0]), told["most"])


def _pipe() -> tuple[BinaryIO, BinaryIO]:
    """The two ends of a new pipe, where one reads and where one writes."""
    out, into = os.pipe()
    return os.fdopen(out, "rb"), os.fdopen(into, "wb")


def _work(asks: BinaryIO, answers: BinaryIO, prepare: Prepare, not_its: Sequence[BinaryIO], worker: int) -> None:
    """What the process does, until nobody asks any more."""
    end_with_parent(worker)
    for one in not_its:
        os.close(one.fileno())
    while (found := read_message(asks)) is not None:
        told, tensors = _answer(prepare, *found)
        try:
            write_message(answers, told, tensors)
        except OSError:
            return  # the worker is gone


def _answer(prepare: Prepare, message: Message, images: Sequence[bytes]) -> tuple[Message, list[bytes]]:
    """What is told about one request, and its tensors."""
    try:
        asked = prepare(message, images)
    except Refusal as error:
        return {"is": "refused", "status": error.status, "code": error.code, "message": str(error)}, []
    except Exception:
        _logger.exception("a request could not be prepared")
        return {"is": "fault"}, []
    tensors: dict[str, Any] = {name: tensor.contiguous() for name, tensor in asked.example.items()}
    return {"is": "asked", "most": asked.most}, [safetensors.torch.save(tensors)]
