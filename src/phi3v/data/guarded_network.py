"""The network under the HTTP client: every connection is resolved, checked and made here, and ends at a deadline.

httpcore2 asks this backend for each connection, those of redirects included. The host is resolved once, all answers are
checked by `address_guard`, and the connection goes to an address that was checked: a name server that answers
differently the next time changes nothing. TLS is httpcore2's; it keeps the host's name. httpcore2 itself reads no
proxy, cookie, password or netrc from the environment and writes no address to a log above DEBUG.

A deadline holds for all that happens on a connection, the look-up and the handshake included, so a server that sends
one byte a second ends as one that sends none. Knows nothing of images or files.
"""

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpcore2

from phi3v.data.address_guard import AllowedHosts, is_literal

_SECONDS_A_ADDRESS = 5.0
"""A host with several addresses: how long one of them may take to answer before the next is tried."""


class NetworkRefusal(Exception):
    """A connection that is not made or has broken.

    Attributes:
        reason_code: "url_private", "url_dns", "url_connect", "url_tls" or "url_timeout".
    """

    def __init__(self, reason_code: str, message: str) -> None:
        """Keep code and text."""
        super().__init__(message)
        self.reason_code = reason_code


class GuardedBackend(httpcore2.NetworkBackend):
    """Connections of one worker, one request at a time.

    Args:
        allowed: hosts that may be private.
    Example: httpcore2.ConnectionPool(network_backend=GuardedBackend(AllowedHosts.parse(["images.intern"])))
    """

    def __init__(self, allowed: AllowedHosts) -> None:
        """Begin without time: `give` some first."""
        self._allowed = allowed
        self._deadline = 0.0

    def give(self, seconds: float) -> None:
        """Set the deadline of all that follows."""
        self._deadline = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the deadline. Raises: NetworkRefusal url_timeout when it has passed."""
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise NetworkRefusal("url_timeout", "the time was used up")
        return seconds

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """A connection to a checked address of a host; `timeout` is the deadline's business."""
        last: Exception | None = None
        for address in self._addresses(host, port):
            try:
                seconds = min(self.left(), _SECONDS_A_ADDRESS)
                inner = httpcore2.SyncBackend().connect_tcp(address, port, seconds, local_address, socket_options)
                return _DeadlineStream(inner, self.left)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                last = error
        self.left()  # a deadline that has passed is the reason, whatever the last address said
        raise NetworkRefusal("url_connect", f"no connection to {host}:{port} ({_words(last)})") from last

    def _addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a host, each of which may be connected to."""
        addresses = [host] if is_literal(host) else _look_up(host, port, self.left())
        for address in addresses:
            if (refusal := self._allowed.refusal(host, port, address)) is not None:
                raise NetworkRefusal("url_private", refusal)
        return addresses


class _DeadlineStream(httpcore2.NetworkStream):
    """A connection whose every operation ends at the deadline of its worker.

    Args:
        inner: the connection.
        left: gives the seconds until the deadline, or raises.
    """

    def __init__(self, inner: httpcore2.NetworkStream, left: Callable[[], float]) -> None:
        """Wrap a connection."""
        self._inner = inner
        self._left = left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """At most so many bytes."""
        return self._inner.read(max_bytes, self._left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """All of the bytes."""
        self._inner.write(buffer, self._left())

    def close(self) -> None:
        """Close the connection."""
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """The connection with TLS. Raises: NetworkRefusal url_tls for a certificate or a handshake that is wrong."""
        try:
            return _DeadlineStream(self._inner.start_tls(ssl_context, server_hostname, self._left()), self._left)
        except httpcore2.ConnectError as error:
            cause = error.__cause__
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise NetworkRefusal("url_tls", f"its certificate is refused: {cause.verify_message}") from error
            if isinstance(cause, ssl.SSLError):
                raise NetworkRefusal("url_tls", f"TLS fails: {cause.reason or _words(cause)}") from error
            raise

    def get_extra_info(self, info: str) -> Any:
        """What httpcore2 asks of the connection: the TLS object, whether there is something to read."""
        return self._inner.get_extra_info(info)


def _look_up(host: str, port: int, seconds: float) -> list[str]:
    """The addresses of a name, each once. Raises: NetworkRefusal url_dns.

    In a thread of its own, because the system's look-up knows no time limit.
    """
    answers: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except (OSError, UnicodeError) as error:
            answers.put(error if isinstance(error, OSError) else OSError(str(error)))

    threading.Thread(target=ask, name="look-up", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty as error:
        raise NetworkRefusal("url_dns", f"the name {host} was not resolved within {seconds:.0f} s") from error
    if isinstance(answer, OSError) or not answer:
        raise NetworkRefusal("url_dns", f"the name {host} is not known here ({_words(answer or None)})")
    return answer


def _words(error: object) -> str:
    """An exception as part of a line."""
    cause = getattr(error, "__cause__", None) or error
    return (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__)[:120]
