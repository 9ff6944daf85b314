"""What stands between a browser and the page of `phi3v chat`: few routes, no other site, nothing from the internet.

In comes an ASGI application, out goes one that answers the routes which the page needs and no others (Gradio has many:
runs, recordings, a proxy, files from web addresses), refuses hosts that it does not serve under and requests that other
sites make, and tells the browser to load nothing from elsewhere. Knows nothing of what the page shows.
"""

import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

ROUTES = re.compile(
    r"/(config|login|logout|theme\.css|favicon\.ico|manifest\.json|robots\.txt)?/?"
    r"|/(assets|static|svelte)/.*"
    r"|/gradio_api/(info|app_id|login_check|user|token|startup-events|theme\.css|upload|upload_progress|cancel|reset"
    r"|queue/(join|data)|heartbeat/\w+|file=/.*)/?"
)
"""Paths that the page asks for; a file is one by its absolute path, never by a web address."""
MAX_BODY = 25_000_000
"""Bytes of a request at most: a photo of 20 MB and what its form adds."""
MOST_TRIES, TRY_SECONDS = 10, 60.0
"""Passwords that one address may try in so many seconds; the right one ends the count."""
_MOST_ADDRESSES = 10_000
HEADERS = {
    "content-security-policy": (  # Gradio's own page has scripts in it, and makes functions of its templates
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class PageGuard:
    """The application that refuses what the page does not need.

    Example: with the hosts {"127.0.0.1", "localhost"} a request for `http://evil.example:7860/` that reached this
    machine is answered with 403, and so is one for `/gradio_api/file=http://10.0.0.1/`, with 404.

    Attributes:
        hosts: names in a Host header that are served; None for any.
    """

    def __init__(self, app: Application, hosts: Collection[str] | None) -> None:
        """Keep what is guarded."""
        self._app = app
        self.hosts = hosts
        self._tries: dict[str, deque[float]] = {}  # address -> when it tried a password

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        address = (scope.get("client") or ("",))[0] if _is_login(scope) else None
        refusal = self._refusal(scope) or (None if address is None else self._try(address))
        if refusal is not None:
            await _refuse(send, *refusal)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if address is not None and message["status"] == 200:
                    self._tries.pop(address, None)
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        await self._app(scope, _bounded(receive), with_headers)

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Status and reason of a request that is not answered."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", ())}
        host, origin = headers.get("host", ""), headers.get("origin")
        name = re.sub(r":\d*$", "", host)
        if scope["type"] != "http" or ROUTES.fullmatch(scope["path"]) is None:
            return 404, "there is nothing here"
        if self.hosts is not None and name not in self.hosts:
            return 403, "this name is not served"
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "another site may not ask here"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return 413, f"more than {MAX_BODY} bytes"
        return None

    def _try(self, address: str) -> tuple[int, str] | None:
        """Counts a password as its request begins, so that many at once count too; the refusal of one too many."""
        now = time.monotonic()
        tries = self._tries.pop(address, deque())
        while tries and now - tries[0] > TRY_SECONDS:
            tries.popleft()
        self._tries[address] = tries  # behind the others: the first one is the one that has not tried for longest
        if len(self._tries) > _MOST_ADDRESSES:
            del self._tries[next(iter(self._tries))]
        if len(tries) >= MOST_TRIES:
            return 429, f"{MOST_TRIES} passwords in {TRY_SECONDS:.0f} s: wait a minute"
        tries.append(now)
        return None


def _is_login(scope: Message) -> bool:
    """Whether a request brings a password."""
    return scope["type"] == "http" and scope["method"] == "POST" and scope["path"].strip("/") == "login"


def _bounded(receive: Receive) -> Receive:
    """Hands a request on up to `MAX_BODY` bytes; what sends more without saying so is cut off as if it had left."""
    read = 0

    async def bounded() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        return {"type": "http.disconnect"} if read > MAX_BODY else message

    return bounded


async def _refuse(send: Send, status: int, reason: str) -> None:
    """Answers with a line of text."""
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
