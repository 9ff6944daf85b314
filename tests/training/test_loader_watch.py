"""When a loader worker is stuck, with clocks and processes made up; test_faults.py has true ones."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from phi3v.training import loader_watch
from phi3v.training.loader_watch import WatchedWorkers


def stuck_at(lives: Callable[[int], dict[int, int]], notes: Callable[[int], list[list[int]]], wait: int = 100) -> int:
    """The second of a wait at which a worker is told to be stuck, 0 for none; a new wait begins after so many seconds.

    Args:
        lives: what changes with the life of each process, by the second.
        notes: of each worker whether it is in a sample, and its notes so far.
        wait: seconds.
    """
    judge = loader_watch._Judge(45.0)
    waits = [object() for _ in range(0, 100, wait)]
    told = (judge.is_stuck(float(now), waits[now // wait], lives(now), torch.tensor(notes(now))) for now in range(100))
    return next((now for now, stuck in enumerate(told) if stuck), 0)


def test_a_worker_is_stuck_by_its_own_life_and_not_for_being_slow_or_without_work() -> None:
    noted = [[0, 0], [0, 0]]
    # sound: without work both wake every five seconds; a long sample is read while others come, or starts
    assert stuck_at(lambda now: {8: now // 5, 9: now // 5}, lambda now: noted) == 0
    assert stuck_at(lambda now: {8: now // 40, 9: now // 5}, lambda now: [[1, 1], [0, now // 40]]) == 0
    # still: before its first sample, with or without another; in a second epoch, while the other goes on
    assert stuck_at(lambda now: {8: 0}, lambda now: [[0, 0]]) == 46
    assert stuck_at(lambda now: {8: 0, 9: now // 5}, lambda now: noted) == 46
    assert stuck_at(lambda now: {8: now, 9: 0}, lambda now: [[1, 20 + now], [0, 30]]) == 46
    # a loop without an end in a sample
    assert stuck_at(lambda now: {8: now, 9: now // 5}, lambda now: [[1, 1], [0, 0]]) == 46
    # batches come, so its own is not needed yet; all have ended, which the loader sees itself
    assert stuck_at(lambda now: {8: 0, 9: now}, lambda now: [[0, 0], [1, now]], wait=40) == 0
    assert stuck_at(lambda now: {}, lambda now: [[1, 1]]) == 0


@pytest.mark.parametrize(("step", "killed"), [(1.0, [8, 9]), (1000.0, [])])
def test_time_in_which_the_run_itself_was_stopped_is_none(
    monkeypatch: pytest.MonkeyPatch, step: float, killed: list[int]
) -> None:
    watch, clock, hit = WatchedWorkers(2), [0.0], []

    def sleep(seconds: float) -> None:
        clock[0] += step
        watch._closed = clock[0] >= 60

    monkeypatch.setattr(loader_watch, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    monkeypatch.setattr(loader_watch, "_life", lambda pid: (0, 0))
    monkeypatch.setattr(loader_watch, "_kill", hit.append)
    watch.processes = [SimpleNamespace(pid=pid, is_alive=lambda: True) for pid in (8, 9)]
    watch._wait = object()
    watch._look()
    assert hit == killed and watch.killed == bool(killed)
