"""Connections that say nothing, or never end: on a socket of their own, with a worker that is none."""

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from serving import FakeBackend, in_loop

from phi3v.serve import connections
from phi3v.serve.api import build_app
from phi3v.serve.connections import Connections, Server
from phi3v.serve.images import ImageSource
from phi3v.serve.limits import Limits
from phi3v.serve.run import _bound

HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-a: "
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}'
ASKING = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ASKING += b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
Open = Callable[[bytes], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


def with_server(use: Callable[[Open], Awaitable[Any]], limits: Limits) -> None:
    """Runs something against a server whose worker never answers; `Open` opens a connection and sends bytes."""

    async def run() -> None:
        kept: list[asyncio.StreamWriter] = []
        app = build_app(
            FakeBackend(limits, []), limits, ImageSource(seconds=1, max_bytes=10**6), key=None, any_host=False
        )
        server = Server(app, Connections(limits.connections, limits.header_seconds), timeout_graceful_shutdown=1)
        with _bound("127.0.0.1", 0) as listening:
            listening.listen()

            async def open_(sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                reader, writer = await asyncio.open_connection(*listening.getsockname())
                writer.write(sent)
                kept.append(writer)  # one that is forgotten closes its connection
                return reader, writer

            serving = asyncio.ensure_future(server.serve(sockets=[listening]))
            try:
                async with asyncio.timeout(60):
                    await use(open_)
            finally:
                server.should_exit = True
                await serving

    in_loop(run())


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes."""
    found = b""
    try:
        while piece := await reader.read(1000):
            found += piece
    except ConnectionResetError:
        pass
    return found


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What is said of the server's health."""
    writer.write(WHOLE)
    return await reader.readuntil(b"}")


def test_headers_that_never_end_are_waited_for_a_while() -> None:
    """From the beginning, behind an answer, and behind one whose request's body was never sent whole."""

    async def use(open_: Open) -> None:
        for sent in (b"", HALF):
            reader, _ = await open_(sent)
            assert await ended(reader) == b""
        for more in (HALF, WHOLE.replace(b"\r\n\r\n", b"\r\nContent-Length: 100\r\n\r\nabc") + HALF):
            reader, writer = await open_(b"")
            assert b" 200 OK" in await answer(reader, writer)
            writer.write(more)
            assert (await ended(reader)).count(b" 200 OK") == (more != HALF)
        reader, _ = await open_(ASKING)  # a request that waits longer than headers may is told at its own deadline
        assert b" 503 " in await ended(reader)

    with_server(use, Limits(seconds=0.6, header_seconds=0.2))


def test_a_new_connection_takes_the_place_of_the_one_that_waited_longest() -> None:
    async def use(open_: Open) -> None:
        asking, _ = await open_(ASKING)
        reader, writer = await open_(b"")
        while b'"requests":1' not in await answer(reader, writer):
            pass
        held = [await open_(HALF) for _ in range(5)]
        for reader, _ in held[:3]:
            assert await ended(reader) == b""
        reader, writer = await open_(b"")
        assert b'"requests":1' in await answer(reader, writer)
        assert await ended(held[3][0]) == b""
        held[4][1].write(b"b\r\n\r\n")
        assert b'"requests":1' in await held[4][0].readuntil(b"}")
        assert b" 503 " in await asking.readuntil(b"}")

    with_server(use, Limits(seconds=5, connections=3, header_seconds=50))


def test_files_that_run_out_are_one_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            found.fault(loop, {"message": "socket.accept()", "exception": OSError(errno.EMFILE, "Too many open files")})
        found.fault(loop, {"message": "another fault"})

    found = Connections(1000, 1.0)
    with caplog.at_level(logging.ERROR):
        in_loop(use())
    assert [one.getMessage() for one in caplog.records] == [
        "connections have to wait: Too many open files",
        "another fault",
    ]
    for files, most in ((1024, 824), (256, 128), (10_000, 1000)):
        monkeypatch.setattr(connections, "_files", lambda files=files: files)
        assert Connections(1000, 1.0).most == most


def test_pieces_are_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the second piece of a stream waits for the first one's acknowledgement, 40 ms on Linux."""
    found: list[int] = []
    original = connections._Timed.connection_made

    def made(self: Any, transport: Any) -> None:
        found.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        original(self, transport)

    monkeypatch.setattr(connections._Timed, "connection_made", made)

    async def use(open_: Open) -> None:
        reader, _ = await open_(WHOLE)
        assert (await reader.read(12)).startswith(b"HTTP/1.1")

    with_server(use, Limits())
    assert len(found) == 1 and found[0]
