"""Loader workers that get stuck: seen by samples that do not come, and ended, so that the run ends too.

In comes the data set of a loader; out comes the same, whose workers note each sample. Where the main process waits and
no worker has taken up or finished a sample for `STUCK_AFTER` seconds, all are killed; torch's loader then raises in the
main process, as it does where the system killed one. Workers end with their parent.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

STUCK_AFTER = 45.0
"""Seconds without any sample; one photo of 20 million pixels takes less than a second."""
_LOOK_EVERY = 1.0
_PROCESS, _NOTES = 0, 1


class WatchedWorkers:
    """The workers of one loader.

    Example: `watch = WatchedWorkers(2); loader = DataLoader(watch.samples(rows), num_workers=2); watch.wait();
    batch = next(iter(loader)); watch.got()`.
    """

    def __init__(self, workers: int, stuck_after: float = STUCK_AFTER) -> None:
        """Watch so many workers; 0 where samples are made in the main process, which is not watched.

        Args:
            workers: of the loader.
            stuck_after: seconds in which at least one of them has to do something while they are waited for.
        """
        self.stuck_after = stuck_after
        self.killed = False
        self._closed = False
        self._notes = torch.zeros((workers, 2), dtype=torch.int64).share_memory_()  # process, notes so far
        self._waiting_since: float | None = None
        self._thread: threading.Thread | None = None

    def samples(self, dataset: Any) -> Any:
        """The samples of a data set, in the kind of data set that it is."""
        return (_Stream if isinstance(dataset, IterableDataset) else _Rows)(dataset, self._notes)

    def wait(self) -> None:
        """The main process waits for a batch from now on."""
        _raise_where_it_waits()
        self._waiting_since = time.monotonic()
        if self._thread is None and len(self._notes):
            self._thread = threading.Thread(target=self._look, name="loader workers", daemon=True)
            self._thread.start()

    def got(self) -> None:
        """It waits no more."""
        self._waiting_since = None

    def __enter__(self) -> Self:
        """The loader is used from now on."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """The loader is not used any more. Of an error its workers end at once: whoever holds the error holds them."""
        self._closed = True
        if kind is None or not len(self._notes):
            return
        _raise_where_it_waits()
        own = set(self._notes[:, _PROCESS].tolist())
        for child in multiprocessing.active_children():
            if child.pid in own:
                child.kill()

    def _look(self) -> None:
        """Runs in a thread of its own, until the end or until workers were killed."""
        before, changed = self._notes.clone(), time.monotonic()
        while not self.killed and not self._closed:
            time.sleep(min(_LOOK_EVERY, self.stuck_after / 4))
            now, since = time.monotonic(), self._waiting_since
            if not torch.equal(before, self._notes):
                before, changed = self._notes.clone(), now
            began = bool((before[:, _PROCESS] > 0).all())  # starting a worker may take long, where it is not forked
            if since is not None and began and now - max(since, changed) > self.stuck_after:
                self.killed = True
                for process in before[:, _PROCESS].tolist():
                    _kill(process)


@contextlib.contextmanager
def taking_over() -> Iterator[None]:
    """Where samples are taken over: a worker that ends with one half handed over raises as any that ends.

    Its tensors are fetched from the worker itself, so a socket breaks where torch would see an end. What a data set
    raised in a worker, whose text begins with "Caught", stays as it is.

    Raises: RuntimeError for a connection that broke.
    """
    try:
        yield
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


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return  # it has ended by itself


def _note(notes: torch.Tensor) -> None:
    """Notes in a worker that it does something."""
    worker = get_worker_info()
    if worker is None:
        return
    if int(notes[worker.id, _PROCESS]) != os.getpid():
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with its parent, however that ends
        notes[worker.id, _PROCESS] = os.getpid()
    notes[worker.id, _NOTES] += 1


class _Rows(Dataset[Any]):
    """Samples by number."""

    def __init__(self, samples: Any, notes: torch.Tensor) -> None:
        self.inner = samples
        self._notes = notes

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        _note(self._notes)
        sample = self.inner[index]
        _note(self._notes)
        return sample


class _Stream(IterableDataset[Any]):
    """Samples of a stream."""

    def __init__(self, samples: Any, notes: torch.Tensor) -> None:
        self.inner = samples
        self._notes = notes

    def __iter__(self) -> Iterator[Any]:
        _note(self._notes)
        for sample in self.inner:
            _note(self._notes)
            yield sample
