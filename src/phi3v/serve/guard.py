"""What stands in front of every route: the key, the name by which the server was asked, and how much is in it.

Pure ASGI: no path is matched here but one, exactly as it was sent, so that no spelling of a path comes round the key.
Knows nothing of models or messages.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from phi3v.serve.limits import Limits
from phi3v.serve.protocol import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_LOOPBACK_HOST = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_DISCARDED = 20_000_000
"""Bytes of a body that are read away before a refusal, so that a client that is still sending gets to read it."""
_DISCARDING = 5.0
"""Seconds that this takes at most."""


class Guard:
    """Asks for the key, and on loopback without one for a host that only this machine can have meant.

    A page in a browser that makes a name of its own point to 127.0.0.1 sends that name as the host: it is refused.

    Args:
        app: what is guarded.
        key: that every request but GET /health must bring; None for none.
        any_host: whether requests may name any host.
    """

    def __init__(self, app: App, *, key: str | None, any_host: bool) -> None:
        """Keep a digest of the key: digests have one length, so comparing them takes one time."""
        self._app, self._any_host = app, any_host
        self._digest = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = scope["headers"]
        if not self._any_host:
            hosts = [value for name, value in headers if name == b"host"]
            if len(hosts) != 1 or not _LOOPBACK_HOST.fullmatch(hosts[0]):
                await refuse(
                    Refusal(421, "wrong_host", "this server answers to localhost and 127.0.0.1"), receive, send
                )
                return
        if self._digest is not None and not _is_health(scope):
            given = [value for name, value in headers if name == b"authorization"]
            token = given[0][7:] if len(given) == 1 and given[0][:7].lower() == b"bearer " else b""
            if not hmac.compare_digest(_digest(token), self._digest):
                await refuse(
                    Refusal(401, "invalid_api_key", "this server needs a key: Authorization: Bearer KEY"), receive, send
                )
                return
        await self._app(scope, receive, send)


class Doorway:
    """How many requests, and bytes of requests, are in the server.

    Attributes:
        requests: that are being read, wait or are answered.
        bytes: of all of them.
    """

    def __init__(self, limits: Limits) -> None:
        """Nobody is in."""
        self._limits = limits
        self.requests = self.bytes = 0

    def enter(self) -> "Place":
        """A place for a request. Raises: Refusal with status 429 where there is none."""
        if self.requests >= self._limits.places:
            raise Refusal(429, "queue_full", "too many requests are waiting: try again later", retry_after=2)
        self.requests += 1
        return Place(self)

    def take(self, count: int) -> None:
        """So many bytes more. Raises: Refusal with status 429 where there is no room."""
        if self.bytes + count > self._limits.held_bytes:
            raise Refusal(429, "queue_full", "too many bytes are waiting: try again later", retry_after=2)
        self.bytes += count


class Place:
    """The place of one request, which is given back once."""

    def __init__(self, doorway: Doorway) -> None:
        """Empty-handed."""
        self._doorway, self._bytes, self._open = doorway, 0, True

    def take(self, count: int) -> None:
        """See `Doorway.take`."""
        self._doorway.take(count)
        self._bytes += count

    def leave(self) -> None:
        """Gives place and bytes back."""
        if self._open:
            self._open = False
            self._doorway.requests -= 1
            self._doorway.bytes -= self._bytes


async def refuse(refusal: Refusal, receive: Receive, send: Send) -> None:
    """Answers with an error; what is still being sent is read away first, up to a limit."""
    left = _DISCARDED
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARDING):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.retry_after is not None:
        headers.append((b"retry-after", str(refusal.retry_after).encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_health(scope: Scope) -> bool:
    """Whether this is the one route without a key, spelt as it is: not "//health", "/health/" or "/%68ealth"."""
    return scope["method"] in ("GET", "HEAD") and scope["path"] == "/health" and scope.get("raw_path") == b"/health"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
