"""SIGTERM and Ctrl-C during a run: an exception between two updates of the weights, never inside one.

The first signal raises `Interrupted` at once, or as soon as what was held is done: an update with what belongs to it,
the writing of a checkpoint. The second one leaves at once. In processes that are forked meanwhile, loader workers, it
does nothing: their parent ends them. A signal that was ignored when the process began, Ctrl-C behind `&` in a script
for instance, stays ignored. What torch raises when a loader worker dies waits too: it looks again by itself where it
waits for a batch. Knows nothing of the Trainer.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from phi3v.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 3.0
"""Seconds in which a launcher has handed on to its ranks what a terminal sent them as well."""


class StopSignals:
    """Catches both signals while its context lasts; outside of the main thread, where Python hands out none, it does
    nothing.

    Example: `with StopSignals() as signals: signals.hold(); step(); signals.release()` ends with `Interrupted` behind
    `step()` where a signal came during it.
    """

    def __init__(self, patient: bool = False) -> None:
        """With `patient` a signal right behind the first does nothing: of ranks in a terminal each gets Ctrl-C from
        there and, right after, from their launcher. A later one leaves at once.
        """
        self.held, self.patient, self._first = False, patient, 0.0
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._of_children: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._on_signal) for number in heard}
            self._told, sys.unraisablehook = sys.unraisablehook, self._on_lost
        return self

    def __exit__(self, *error: Any) -> None:
        self._set(False)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            sys.unraisablehook = self._told
        self._before = {}

    def hold(self) -> None:
        """From here on a signal waits."""
        self._set(True)

    def release(self) -> None:
        """From here on a signal acts. Raises: Interrupted when one came meanwhile."""
        self._set(False)
        self.check()

    def check(self) -> None:
        """Raises: Interrupted when a signal came, also one whose exception was lost, in a destructor say."""
        if self.received is not None and not self.held:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Inside this context signals act although they are held outside."""
        outside = self.held
        self.release()
        try:
            yield
        finally:
            self._set(outside)

    def _set(self, held: bool) -> None:
        """Holds or lets go, and what is raised when a child dies with it."""
        if held and not self.held and self._before and hasattr(signal, "SIGCHLD"):
            self._of_children = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not held and self._of_children is not None:
            signal.signal(signal.SIGCHLD, self._of_children)
            self._of_children = None
        self.held = held

    def _on_lost(self, lost: Any) -> None:
        """What Python calls for an exception that it cannot raise, in a destructor: of ours nothing is printed, as
        `check` raises it again.
        """
        if not isinstance(lost.exc_value, Interrupted):
            self._told(lost)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """What Python calls."""
        if os.getpid() != self._process:
            return
        if self.received is not None:
            if self.patient and time.monotonic() - self._first < _ECHO:
                return
            leave(number)
        self.received, self._first = number, time.monotonic()
        self.check()


def leave(number: int) -> None:
    """Ends this process at once, loader workers first, with the exit code of a signal: 143 for SIGTERM."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)
