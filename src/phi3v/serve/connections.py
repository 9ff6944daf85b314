"""Open connections: how many there may be, and how long one may take to say what it wants.

uvicorn has no limit for either: its own time begins behind a first answer and ends at the next byte. `Connections`
makes the protocols of one server, each uvicorn's own for h11, which takes 16 kB of headers at most. Knows no requests.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import sys
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_logger = logging.getLogger(__name__)
_NO_MORE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_OF_OTHERS = 200
"""Files of the process that are no connections, or new ones that have no place yet."""
_AT_ONCE = 16
"""Connections that are taken at once: asyncio goes on taking them, up to this, where no file is left for any."""
_QUEUE = 2048
"""Connections that the system keeps waiting."""
_SILENCE = 60.0
"""Seconds from one line about files to the next."""


class Connections:
    """All connections of one server.

    A connection that has no request under way is closed after `seconds`. Where there are `most`, a new one takes the
    place of the one that has waited longest, or is closed itself where all are at work.

    Args:
        most: connections at once; fewer where the process may open fewer files.
        seconds: for the headers of a request.
    """

    def __init__(self, most: int, seconds: float) -> None:
        """Nobody is there."""
        files = _files()
        self.most, self.seconds = min(most, max(files // 2, files - _OF_OTHERS)), seconds
        self._open: dict[_Timed, None] = {}  # in the order in which they began to wait
        self._told = -_SILENCE

    def protocol(self, **given: Any) -> asyncio.Protocol:
        """What uvicorn makes for each connection: its `http` option."""
        return _Timed(self, **given)

    def enter(self, one: "_Timed") -> None:
        """Makes room for a new connection, which may be its own end."""
        self._open[one] = None
        if len(self._open) > self.most:
            self.close(next((other for other in self._open if not other.at_work), one))

    def waits(self, one: "_Timed") -> None:
        """A connection has no request under way from now on."""
        if one in self._open:
            del self._open[one]
            self._open[one] = None

    def close(self, one: "_Timed") -> None:
        """Ends a connection without a word."""
        self.leave(one)
        one.transport.abort()

    def leave(self, one: "_Timed") -> None:
        """A connection is over."""
        self._open.pop(one, None)

    def fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handler of a loop's faults: that no file is left for a connection is a line a minute, without its stack."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _NO_MORE_FILES:
            loop.default_exception_handler(context)
        elif loop.time() - self._told >= _SILENCE:
            self._told = loop.time()
            _logger.error("connections have to wait: %s", error.strerror)


class _Timed(H11Protocol):
    """uvicorn's protocol, with a time for the headers of each request."""

    def __init__(self, all_of_them: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._all = all_of_them
        self._timer: asyncio.TimerHandle | None = None

    @property
    def at_work(self) -> bool:
        """Whether a request has come whose answer is not given yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        self._all.enter(self)

    def on_response_complete(self) -> None:
        self._all.waits(self)
        self._wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._all.leave(self)
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(self._all.seconds, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _late(self) -> None:
        if not self.at_work:  # else the time begins behind the answer
            self._all.close(self)


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to its caller and connections to its `Connections`."""

    def __init__(self, app: Any, connections: Connections, **options: Any) -> None:
        """Options are those of `uvicorn.Config`."""
        quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "server_header": False, "lifespan": "off"}
        kept: dict[str, Any] = {"http": connections.protocol, "ws": "none", "backlog": _AT_ONCE}
        super().__init__(uvicorn.Config(app, **quiet, **kept, proxy_headers=False, **options))
        self._connections = connections

    def capture_signals(self) -> Any:
        """Nothing: it would die of the signal again."""
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes connections from now on."""
        asyncio.get_running_loop().set_exception_handler(self._connections.fault)
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(_QUEUE)


def _files() -> int:
    """Files that this process may have open at once."""
    if sys.platform == "win32":
        return 2**31
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if soft == resource.RLIM_INFINITY else soft
