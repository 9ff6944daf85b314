"""Loader workers that get stuck: seen by processes that do nothing, and ended, so that the run ends too.

In comes a loader; its workers are started under a watch and note each sample. Where the main process has waited for a
batch for `STUCK_AFTER` seconds and one of them shows no life in as many, all are killed; torch's loader then raises in
the main process, as it does where the system killed one. A worker with nothing to do wakes every five seconds to look
for its parent, and a slow one reads or computes: both are alive. Workers end with their parent.
"""

import contextlib
import copy
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import psutil
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from phi3v.errors import DataError, TrainingError
from phi3v.training.step_faults import gathering_error, is_out_of_memory

STUCK_AFTER = 45.0
"""Seconds without any life; one photo of 20 million pixels takes less than a second."""
_LOOK_EVERY = 1.0
_IN_SAMPLE, _NOTES = 0, 1


class WatchedWorkers:
    """The workers of one loader.

    Example: `watch = WatchedWorkers(2); loader = watch.over(DataLoader(watch.samples(rows), num_workers=2));
    watch.wait(); batch = next(iter(loader)); watch.got()`.
    """

    def __init__(self, workers: int, stuck_after: float = STUCK_AFTER) -> None:
        """Watch so many workers; 0 where samples are made in the main process, which is not watched.

        Args:
            workers: of the loader.
            stuck_after: seconds in which each of them has to show life while one is waited for.
        """
        self.stuck_after = stuck_after
        self.killed = False
        self.processes: list[Any] = []
        self._closed = False
        self._notes = torch.zeros((workers, 2), dtype=torch.int64).share_memory_()  # in a sample or not, notes so far
        self._wait: object | None = None
        self._thread: threading.Thread | None = None
        self._judge = _Judge(stuck_after)

    def samples(self, dataset: Any) -> Any:
        """The samples of a data set, in the kind of data set that it is."""
        return (_Stream if isinstance(dataset, IterableDataset) else _Rows)(dataset, self._notes)

    def over(self, loader: Any) -> Any:
        """The loader, whose workers are known from their start: a stuck one may never come to a first sample."""
        inner = getattr(loader, "base_dataloader", loader)  # accelerate puts its own around torch's
        if inner.num_workers:
            context: Any = copy.copy(multiprocessing.get_context())
            context.Process = functools.partial(self._process, context.Process)
            inner.multiprocessing_context = context
        return loader

    def wait(self) -> None:
        """The main process waits for a batch from now on."""
        _raise_where_it_waits()
        self._wait = object()
        if self._thread is None and len(self._notes):
            self._thread = threading.Thread(target=self._look, name="loader workers", daemon=True)
            self._thread.start()

    def got(self) -> None:
        """It waits no more."""
        self._wait = None
        _raise_where_it_waits()  # the first batch's loader has set its handler, which the next hold would keep

    def __enter__(self) -> Self:
        """The loader is used from now on."""
        return self

    def __exit__(self, *error: object) -> None:
        """The loader is not used any more, and none of its workers is left: whoever holds an error holds them, and one
        that is stopped outlives the signal by which torch and Python end workers; Python would wait for it for ever."""
        self._closed = True
        self._end_all()

    def _process(self, make: Callable[..., Any], *, target: Callable[..., None], **named: Any) -> Any:
        """A worker that torch makes. The first one of an epoch ends what is left over of the epoch before."""
        if len(self.processes) >= len(self._notes):
            self._end_all()
            self._notes.zero_()  # one that was ended in a sample is in it no more
        process = make(target=_Worker(target), **named)
        self.processes.append(process)
        return process

    def _end_all(self) -> None:
        if self.processes:
            _raise_where_it_waits()
        for process in self.processes:
            if process.is_alive():
                process.kill()
        self.processes = []

    def _look(self) -> None:
        """Runs in a thread of its own, until the end or until workers were killed."""
        every, clock, before = min(_LOOK_EVERY, self.stuck_after / 4), 0.0, time.monotonic()
        while not self.killed and not self._closed:
            time.sleep(every)
            now = time.monotonic()
            clock += min(now - before, 2 * every)  # where the run itself was stopped its workers may have been too
            before = now
            wait, lives = self._wait, {}
            if wait is not None:
                pids = [process.pid for process in self.processes if process.is_alive()]
                lives = {pid: life for pid in pids if (life := _life(pid)) is not None}
            if self._judge.is_stuck(clock, wait, lives, self._notes):
                self.killed = True
                for pid in lives:
                    _kill(pid)


class _Judge:
    """Says when a worker is stuck, by what is told of all of them about once a second."""

    def __init__(self, stuck_after: float) -> None:
        self._stuck_after = stuck_after
        self._wait: object | None = None
        self._lives: dict[int, tuple[object, float]] = {}
        self._notes, self._noted, self._since = torch.zeros(0), 0.0, 0.0

    def is_stuck(self, now: float, wait: object | None, lives: dict[int, Any], notes: torch.Tensor) -> bool:
        """Whether the wait is for nothing.

        Two things are no life: a process that did nothing at all, wherever it is, and a sample that is being made
        while no sample is begun or ended anywhere, as in a loop without an end. What the first allows, a worker
        without work and one that hands over or starts, the second passes over.

        Args:
            now: seconds of any clock.
            wait: another object for each wait, None where nothing is waited for.
            lives: of each worker that has not ended what changes while it does anything.
            notes: what workers note of their samples.
        """
        if wait is not self._wait:
            self._wait, self._since = wait, now
        if not torch.equal(notes, self._notes):
            self._notes, self._noted = notes.clone(), now
        self._lives = {
            pid: old if (old := self._lives.get(pid, (None, now)))[0] == life else (life, now)
            for pid, life in lives.items()
        }
        if wait is None or not lives or now - self._since <= self._stuck_after:
            return False
        still = any(now - at > self._stuck_after for _, at in self._lives.values())
        return still or (bool(notes[:, _IN_SAMPLE].any()) and now - self._noted > self._stuck_after)


@contextlib.contextmanager
def taking_over() -> Iterator[None]:
    """Where samples are taken over: a worker that ends with one half handed over raises as any that ends.

    Its tensors are fetched from the worker itself, so a socket breaks where torch would see an end. What a data set
    raised in a worker, whose text begins with "Caught", stays as it is; of what is wrong with the data the line alone
    is left, without the worker's traceback that torch puts in front.

    Raises: RuntimeError for a connection that broke; GatheringError where memory is used up; DataError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error) and not isinstance(error, TrainingError):
            raise gathering_error(error) from error
        raise
    except DataError as error:
        if not str(error).startswith("Caught"):
            raise
        raise type(error)(str(error).rstrip().rpartition("\nphi3v.errors.")[2].partition(": ")[2]) from None
    except (ConnectionError, EOFError) as error:
        if str(error).startswith("Caught"):
            raise
        raise RuntimeError(f"DataLoader worker ended while its sample was taken over: {error!r}") from error


def _raise_where_it_waits() -> None:
    """Takes back torch's handler of SIGCHLD, by which a worker's end raises wherever the main process is, and again as
    each later process ends. The loader asks every five seconds whether its workers are there.
    """
    number = getattr(signal, "SIGCHLD", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        return
    if getattr(signal.getsignal(number), "__module__", None) == "torch.utils.data._utils.signal_handling":
        signal.signal(number, signal.SIG_DFL)


def _life(pid: int) -> object | None:
    """What changes while a process does anything: its time, and how often its first thread began and ended to wait.

    None of a process that has ended. Where the system does not count waits, as in some sandboxes, each answer is
    another one: no process is stuck by it.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return (process.num_ctx_switches(), process.cpu_times()) if _counts_waits() else object()
    except psutil.Error:
        return None


@functools.cache
def _counts_waits() -> bool:
    try:
        return sum(psutil.Process().num_ctx_switches()) > 0  # this one has waited for a file by now
    except NotImplementedError:
        return False


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it has ended by itself


class _Worker:
    """What a worker runs: torch's own loop. Where that may be pickled, so may this."""

    def __init__(self, loop: Callable[..., None]) -> None:
        self._loop = loop

    def __call__(self, *args: Any) -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with its parent, however that ends
        self._loop(*args)


def _note(notes: torch.Tensor, *, in_sample: bool) -> None:
    """Notes in a worker that it begins or has ended a sample."""
    worker = get_worker_info()
    if worker is not None:
        notes[worker.id, _IN_SAMPLE] = in_sample
        notes[worker.id, _NOTES] += 1


class _Rows(Dataset[Any]):
    """Samples by number."""

    def __init__(self, samples: Any, notes: torch.Tensor) -> None:
        self.inner = samples
        self._notes = notes

    def __len__(self) -> int:
        return len(self.inner)

    def choose_epoch(self, epoch: int) -> None:
        """Tells samples that are others in each epoch."""
        if hasattr(self.inner, "choose_epoch"):
            self.inner.choose_epoch(epoch)

    def __getitem__(self, index: int) -> Any:
        _note(self._notes, in_sample=True)
        try:
            return self.inner[index]
        finally:
            _note(self._notes, in_sample=False)


class _Stream(IterableDataset[Any]):
    """Samples of a stream."""

    def __init__(self, samples: Any, notes: torch.Tensor) -> None:
        self.inner = samples
        self._notes = notes

    def __iter__(self) -> Iterator[Any]:
        for sample in self.inner:  # the first may take long: a run that goes on passes over all rows before it
            _note(self._notes, in_sample=False)
            yield sample
            _note(self._notes, in_sample=True)
        _note(self._notes, in_sample=False)
