"""Many web addresses into the cache: in parallel, each a few times, as fast as their servers want.

In come addresses and a cache; out comes what is there and what is not, with a reason each. What is cached is not asked
again, nor what has failed for good (404, 410, no image); everything else is, in the next call. A server that answers
429 or 503 with Retry-After gets its pause from all workers, not only from the one that was told, and from addresses of
other servers that redirect to it; one that asks for more than `FetchLimits.longest_wait` is left alone for the rest of
the call. Safe to kill at any moment and to run beside itself: `image_cache` says why. One attempt is the business of
`download`.
"""

import heapq
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpcore2

from phi3v.data.address_guard import AddressError, AllowedHosts, parse_address, shorten
from phi3v.data.download import Downloader, FetchLimits, PausedHost, UrlProblem
from phi3v.data.image_cache import CacheWriter, FetchFailure, ImageCache, in_shard
from phi3v.errors import ConfigError

_DECODERS = 2
"""Threads that decode: a photo of 20 million pixels takes 160 MB meanwhile, and a thread keeps some of that."""

_LONGEST_TOLD = 1e9
"""Seconds of a pause that a message repeats; servers may ask for numbers of any length."""


@dataclass(frozen=True)
class FetchSummary:
    """What a call found: total = cached + downloaded + len(failures).

    Attributes:
        total: different addresses of this shard.
        cached: those that were there before.
        downloaded: those that came now.
        failures: address -> why it is not there.
        bytes: size of what came now.
    """

    total: int
    cached: int
    downloaded: int
    failures: dict[str, FetchFailure]
    bytes: int


def fetch_images(
    urls: Iterable[str],
    cache: ImageCache,
    limits: FetchLimits | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> FetchSummary:
    """Downloads the images that are not in the cache.

    Args:
        urls: web addresses; the same one may come several times.
        cache: where they go.
        limits: FetchLimits() where nothing is said.
        on_progress: called in the caller's thread with (done, total), first for what was there before, then after each
            address.
        shard: (i, n) takes the i-th of n parts, from 0; an address belongs to a part by its hash, so n calls with the
            same addresses, in any order, ask for each once.
    Example: of ten addresses four were cached, five came and one answered 404 -> FetchSummary(total=10, cached=4,
        downloaded=5, failures={"https://...": FetchFailure("url_not_found", "image https://...")}, bytes=180442)
    Raises: ConfigError for a shard or an allowed host that is none; DataError when the cache cannot be written.
        Whatever an address does becomes a failure.
    """
    limits = limits or FetchLimits()
    allowed = AllowedHosts.parse(limits.allow_hosts)
    mine = _shard(urls, shard)
    failures: dict[str, FetchFailure] = {}
    wanted: list[str] = []
    for url in mine:
        if cache.path(url) is None:
            failure = cache.failure(url)
            if failure is None:
                wanted.append(url)
            else:
                failures[url] = failure
    done, size = len(mine) - len(wanted), 0
    cached = done - len(failures)
    progress = on_progress or (lambda done, total: None)
    progress(done, len(mine))
    if wanted:
        with cache.writing() as writer, _Crew(wanted, writer, limits, allowed) as crew:
            for url, outcome in crew.outcomes():
                if isinstance(outcome, FetchFailure):
                    failures[url] = outcome
                else:
                    size += outcome
                done += 1
                progress(done, len(mine))
    ordered = {url: failures[url] for url in mine if url in failures}
    return FetchSummary(len(mine), cached, len(mine) - cached - len(ordered), ordered, size)


def _shard(urls: Iterable[str], shard: tuple[int, int]) -> list[str]:
    """The different addresses of a part, in their order, without the blanks around them, as rows name them."""
    number, count = shard
    if not 0 <= number < count:
        raise ConfigError(
            f"shard {number}/{count} is none: parts of n count from 0 to n-1, 0/{max(count, 1)} is the first"
        )
    different = dict.fromkeys(url.strip(" ") for url in urls)
    return [url for url in different if in_shard(url, shard)]


@dataclass
class _Job:
    """An address on its way.

    Attributes:
        url: the address.
        left: seconds of its time that are left.
        attempts: how often it was asked.
        machines: whom it asks, as far as that matters: its own, and those behind redirects that asked for a pause.
    """

    url: str
    left: float
    attempts: int = 0
    machines: set[str] = field(default_factory=set)


class _Crew:
    """The workers of one call, as threads.

    Args:
        urls: what to ask, each once.
        writer: takes what comes.
        limits: how much of everything.
        allowed: hosts that may be private.
    """

    def __init__(self, urls: list[str], writer: CacheWriter, limits: FetchLimits, allowed: AllowedHosts) -> None:
        """Make the jobs; `with` starts the threads."""
        self._writer = writer
        self._limits = limits
        self._allowed = allowed
        self._turns = _Turns([_Job(url, limits.seconds, machines={_machine(url)}) for url in urls])
        self._results: queue.SimpleQueue[tuple[str, int | FetchFailure] | Exception] = queue.SimpleQueue()
        self._number = len(urls)
        self._tls = httpcore2.default_ssl_context()
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(max(1, min(limits.workers, len(urls))))
        ]

    def __enter__(self) -> "_Crew":
        """Start."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; a worker in the middle of a request ends by itself at its deadline."""
        self._turns.stop()
        for thread in self._threads:
            thread.join(timeout=0.2)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def outcomes(self) -> Iterable[tuple[str, int | FetchFailure]]:
        """Each address with the size of its image or with its failure, as they come."""
        for _ in range(self._number):
            result = self._results.get()
            if isinstance(result, OSError):  # those of the network are failures by now
                raise self._writer.cache.unwritable(result) from result
            if isinstance(result, Exception):
                raise result
            yield result

    def _work(self) -> None:
        """What one thread does; an error that is no address's fault goes to the caller."""
        try:
            with Downloader(self._limits, self._allowed, self._tls, self._decoders) as downloader:
                while (job := self._turns.take()) is not None:
                    outcome = self._attempt(job, downloader)
                    if outcome is not None:
                        self._results.put((job.url, outcome))
                        self._turns.finish()
        except Exception as error:
            self._results.put(error)

    def _attempt(self, job: _Job, downloader: Downloader) -> int | FetchFailure | None:
        """One attempt: the size of the image, the failure, or None when the job got another turn."""
        file = self._writer.temporary()
        began = time.monotonic()
        try:
            downloader.download(job.url, file, job.left, may_ask=self._turns.check)
            return self._writer.keep(job.url, file)
        except PausedHost as paused:
            job.left -= time.monotonic() - began
            return self._unasked(job, paused)
        except UrlProblem as problem:
            job.attempts += 1
            job.left -= time.monotonic() - began
            if problem.pause is not None:
                job.machines.add(problem.host)
                if problem.pause > self._limits.longest_wait:
                    told = min(problem.pause, _LONGEST_TOLD)
                    self._turns.close(problem.host, problem.failure.reason_code, told)
            if problem.again and job.attempts < self._limits.attempts and job.left > 0:
                wait = self._limits.backoff * 2 ** (job.attempts - 1)
                if problem.pause is not None:
                    wait = max(wait, problem.pause)
                if wait <= self._limits.longest_wait:
                    self._turns.again(job, wait, pausing=problem.host if problem.pause is not None else None)
                    return None
            if problem.lasting:
                self._writer.remember(job.url, problem.failure)
            return problem.failure
        finally:
            file.unlink(missing_ok=True)

    def _unasked(self, job: _Job, paused: PausedHost) -> FetchFailure | None:
        """What becomes of an address whose server, or one that it redirects to, wants no requests now.

        It gets another turn when the pause is over, which is no further attempt; None then. A server that is left alone
        for the rest of the call is its failure.
        """
        job.machines.add(paused.machine)
        closed = self._turns.closed(paused.machine)
        if closed is None:
            self._turns.again(job, paused.seconds or 0.0)
            return None
        code, pause = closed
        words = f"not asked: its server has just asked for a pause of {pause:,.0f} s; run the command again later"
        return FetchFailure(code, " ".join(f"image {shorten(job.url)}: {paused.shown}{words}".split()))


class _Turns:
    """Whose turn it is: addresses that are due, and hosts that have asked for a pause.

    Args:
        jobs: all of them, due in their order.
    """

    def __init__(self, jobs: list[_Job]) -> None:
        """All are due."""
        self._waiting = [(0.0, number, job) for number, job in enumerate(jobs)]  # sorted, so it is a heap
        self._given = self._open = len(jobs)
        self._pauses: dict[str, float] = {}
        self._closed: dict[str, tuple[str, float]] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def take(self) -> _Job | None:
        """The next address, as soon as it is due; None when all are finished."""
        with self._changed:
            while self._open and not self._stopped:
                wait = self._wait_for_first()
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._waiting)[2]
                self._changed.wait(wait)
        return None

    def _wait_for_first(self) -> float | None:
        """Seconds until the first of those that wait is due; None when none waits."""
        while self._waiting:
            due, number, job = self._waiting[0]
            pause = max(self._pause(machine) for machine in job.machines)
            if pause <= due:
                return due - time.monotonic()
            heapq.heapreplace(self._waiting, (pause, number, job))
        return None

    def _pause(self, machine: str) -> float:
        """When a machine's pause ends; one that is closed has none: nobody waits for it."""
        return 0.0 if machine in self._closed else self._pauses.get(machine, 0.0)

    def check(self, machine: str) -> None:
        """Raises: PausedHost when a machine must not be asked now."""
        with self._changed:
            left = self._pause(machine) - time.monotonic()
            if machine in self._closed:
                raise PausedHost(machine, None)
            if left > 0:
                raise PausedHost(machine, left)

    def again(self, job: _Job, seconds: float, *, pausing: str | None = None) -> None:
        """Another turn for an address after so many seconds, and before that none for a machine that asked for it."""
        with self._changed:
            due = time.monotonic() + seconds
            if pausing is not None:
                self._pauses[pausing] = max(due, self._pauses.get(pausing, 0.0))
            heapq.heappush(self._waiting, (due, self._given, job))
            self._given += 1
            self._changed.notify_all()

    def close(self, host: str, reason_code: str, pause: float) -> None:
        """No more requests to a host: why, and the seconds that it has asked for."""
        with self._changed:
            self._closed.setdefault(host, (reason_code, pause))
            self._changed.notify_all()

    def closed(self, host: str) -> tuple[str, float] | None:
        """Why a host is left alone, as `close` was told; None for one that may be asked."""
        with self._changed:
            return self._closed.get(host)

    def finish(self) -> None:
        """One address less."""
        with self._changed:
            self._open -= 1
            if not self._open:
                self._changed.notify_all()

    def stop(self) -> None:
        """No more turns."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def _machine(url: str) -> str:
    """The machine that an address asks first; "" for an address that asks none."""
    try:
        address = parse_address(url)
    except AddressError:
        return ""
    return address.machine
