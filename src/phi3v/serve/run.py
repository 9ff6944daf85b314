"""`phi3v serve`: starts the worker, then listens, and ends in order when it is asked to.

In come a TARGET, adapters, an address and limits; nothing comes out until the server has ended. Binding an address
that other machines reach without a key is refused. SIGTERM and Ctrl-C let answers end that are being given.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError, MissingPackageError, install
from phi3v.serve.limits import Limits

_logger = logging.getLogger(__name__)
LEAST_KEY = 16
"""Characters of a key."""


@dataclass(frozen=True)
class ServeOptions:
    """How a server listens.

    Attributes:
        host: address to bind; other machines reach all but loopback addresses.
        port: of it; 0 takes a free one.
        key: that requests must bring, None for none.
        allow_hosts: hosts whose images may be fetched, over https.
        limits: of requests.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    allow_hosts: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Raises: ConfigError for an address that is open to other machines without a key, and for a weak key."""
        if self.key is not None and (len(self.key) < LEAST_KEY or not self.key.isascii() or not self.key.isprintable()):
            raise ConfigError(f"the key must be at least {LEAST_KEY} printable ASCII characters: openssl rand -hex 32")
        if self.key is None and not is_loopback(self.host):
            raise ConfigError(
                f"{self.host} is open to other machines: set a key (--api-key-file or PHI3V_API_KEY), or bind 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address: "127.0.0.1", "::1" and "localhost" -> True; "0.0.0.0" -> False."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown_address(host: str, port: int) -> str:
    """What opens on this machine: ("0.0.0.0", 80) -> "http://127.0.0.1:80", ("::1", 80) -> "http://[::1]:80"."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"


def for_others(host: str) -> str:
    """How other machines open it, where it listens at all addresses of this one; else ""."""
    return ", from other machines with this one's name or address in it" if host in ("0.0.0.0", "::") else ""


def read_key(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """The key: the first line of a file, else PHI3V_API_KEY; None where neither is given. Raises: ConfigError."""
    if file is None:
        return environment.get("PHI3V_API_KEY") or None
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # Windows' editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"{file} cannot be read: {reason}; name a file whose first line is the key") from error
    if not lines or not lines[0].strip():
        raise ConfigError(f"{file} holds no key: write one into its first line")
    return lines[0].strip()


def serve(
    target: str,
    adapters: Mapping[str, str],
    options: ServeOptions,
    *,
    device: str | None = None,
    dtype: str | None = None,
    on_ready: Callable[[str, list[str]], None] = lambda address, names: None,
) -> None:
    """Serves a TARGET until SIGTERM or Ctrl-C.

    Args:
        target: run, adapter, model folder or hub id.
        adapters: more adapters of the same base, by name.
        options: where and how.
        device: "auto", "cpu" or "cuda"; None as the TARGET's recipe says.
        dtype: number type of the weights; None as the recipe says.
        on_ready: told of the address and the names when requests are taken.

    Raises:
        ConfigError, CheckpointError: what is named cannot be served, or the address is taken.
        MissingPackageError: FastAPI or uvicorn are not installed.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(f"phi3v serve needs FastAPI and uvicorn: {install('serve')}") from error
    first = {"target": target, "adapters": dict(adapters), "device": device, "dtype": dtype}
    with _bound(options.host, options.port) as listening:
        asyncio.run(_serve(first, options, listening, on_ready))


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket of this address, found before minutes of loading. Raises: ConfigError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol by name: asyncio sends small pieces at once (TCP_NODELAY) only where it reads TCP here. Else the
    # second piece of a stream waits 40 ms, until the first is acknowledged.
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{host}:{port} cannot be bound: {reason}; choose another --port or --host") from error
        yield listening


async def _serve(
    first: dict[str, Any],
    options: ServeOptions,
    listening: socket.socket,
    on_ready: Callable[[str, list[str]], None],
) -> None:
    """The life of the server."""
    from phi3v.serve.api import build_app
    from phi3v.serve.backend import Backend
    from phi3v.serve.connections import Connections, Server
    from phi3v.serve.images import ImageSource

    limits = options.limits
    backend = Backend(first, limits)
    images = ImageSource(options.allow_hosts, seconds=limits.fetch_seconds, max_bytes=limits.body_bytes)
    # Whoever has the key may name any host; without one, names of other machines are a trick of a web page.
    app = build_app(backend, limits, images, key=options.key, any_host=options.key is not None)
    connections = Connections(limits.connections, limits.header_seconds)
    server = Server(app, connections, timeout_graceful_shutdown=int(limits.drain_seconds))
    loop = asyncio.get_running_loop()
    asked_to_stop = asyncio.Event()

    def stop() -> None:
        server.should_exit = True
        asked_to_stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        starting = asyncio.ensure_future(backend.start())
        stopping = asyncio.ensure_future(asked_to_stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not asked_to_stop.is_set():
            await starting
            if limits.context is not None and backend.context < limits.context:
                _logger.warning("context is %d, and the model has %d: that is taken", limits.context, backend.context)
            listening.listen(2048)
            address, port = listening.getsockname()[:2]
            on_ready(f"{shown_address(address, port)}/v1", [one["id"] for one in backend.models])
            await server.serve(sockets=[listening])
        starting.cancel()
        stopping.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
    finally:
        await backend.stop()
