"""A web server on the loopback interface that serves images, or misbehaves in one of many ways, by path.

`with image_server() as server: server.url("/good/1.png")`. Every connection is counted, `server.seen` holds the request
heads. Bodies that never end stop with the server.
"""

import gzip
import io
import random
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (16, 12)) -> bytes:
    """An image file whose pixels depend on the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


JPEG = picture(0, "JPEG", (64, 48))
HTML = b"<!DOCTYPE html><html><body>Sign in to continue</body></html>"


class ImageServer(socketserver.ThreadingTCPServer):
    """Answers by path; see `BEHAVIOURS`."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, tls: ssl.SSLContext | None = None, delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tls = tls
        self.delay = delay
        self.scheme = "https" if tls else "http"
        self.port = self.server_address[1]
        self.connections = 0
        self.seen: list[tuple[float, bytes]] = []
        self.stopped = threading.Event()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def count(self, path: str) -> int:
        """Requests for a path so far."""
        return sum(head.startswith(f"GET {path} ".encode()) for _, head in self.seen)


class Handler(socketserver.BaseRequestHandler):
    """One connection."""

    server: ImageServer

    def handle(self) -> None:
        self.server.connections += 1
        with suppress(OSError, ValueError):
            self.request.settimeout(20)
            if self.server.tls:
                self.request = self.server.tls.wrap_socket(self.request, server_side=True)
            while self.answer_one():
                pass

    def answer_one(self) -> bool:
        """One request. Returns: whether the connection stays open."""
        head = b""
        while b"\r\n\r\n" not in head:
            received = self.request.recv(65536)
            if not received:
                return False
            head += received
            if head.startswith(b"\x16\x03"):  # TLS where none is spoken
                self.send(400)
                return False
        self.server.seen.append((time.monotonic(), head))
        path = head.split(b" ")[1].decode()
        time.sleep(self.server.delay)
        behaviour = BEHAVIOURS.get("/" + path.split("/")[1].partition("?")[0])
        if behaviour is None:
            number = int(path.rpartition("/")[2].partition(".")[0])
            self.send(200, picture(number), "image/png")
            return True
        behaviour(self)
        return False

    def send(self, status: int, body: bytes = b"", kind: str = "text/plain", **headers: object) -> None:
        """A whole answer; a header in the arguments replaces the usual one, underscores are hyphens."""
        fields = {"Content-Type": kind, "Content-Length": len(body)}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"HTTP/1.1 {status} Something", *(f"{name}: {value}" for name, value in fields.items() if value != "")]
        self.request.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def drip(self, piece: bytes, pause: float) -> None:
        """The same bytes again and again, until the other side or the server has enough."""
        while not self.server.stopped.wait(pause):
            self.request.sendall(piece)


def reset(handler: Handler) -> None:
    """Half a body, then RST."""
    handler.send(200, JPEG[:300], "image/jpeg", Content_Length=len(JPEG))
    time.sleep(0.05)  # a RST that overtakes the body would be a connection without an answer
    handler.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.request.close()


def endless(handler: Handler) -> None:
    handler.send(200, JPEG, "image/jpeg", Content_Length="")
    handler.drip(bytes(65536), 0.0)


def one_byte_a_second(handler: Handler) -> None:
    handler.send(200, JPEG[:10], "image/jpeg", Content_Length=len(JPEG))
    handler.drip(b"\0", 1.0)


def slow_head(handler: Handler) -> None:
    handler.request.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    handler.drip(b"a", 0.3)


def loop(handler: Handler) -> None:
    handler.send(302, Location="/loop")


def busy_once(handler: Handler) -> None:
    """429 with Retry-After: 1 to the first request."""
    if sum(b"/busy-once" in head for _, head in handler.server.seen) == 1:
        handler.send(429, Retry_After="1")
    else:
        handler.send(200, JPEG, "image/jpeg")


def fails_once(handler: Handler) -> None:
    if sum(b"/fails-once" in head for _, head in handler.server.seen) == 1:
        handler.send(500)
    else:
        handler.send(200, JPEG, "image/jpeg")


def mutated(handler: Handler) -> None:
    """An answer with a few bytes changed, put in or left out, by the number in the path."""
    path = handler.server.seen[-1][1].split(b" ")[1]
    chance = random.Random(path)
    answer = bytearray(chance.choice(ANSWERS))
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(min(len(answer), 200))
        odd = [
            chance.randbytes(5),
            b"9" * 5000,
            b"\r\n",
            b"\0",
            b"Location: //[::1%lo]:x/\\\r\n",
            b"Content-Length: -1\r\n",
        ]
        answer[place : place + chance.choice([0, 1, 7])] = chance.choice(odd)
    handler.request.sendall(answer)


ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b" % (len(JPEG), JPEG),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(JPEG), JPEG),
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/a\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 429 Busy\r\nRetry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Encoding: gzip, br\r\nContent-Length: 0\r\n\r\n",
)


def elsewhere(handler: Handler) -> None:
    """A redirect to another port of this machine: /elsewhere/8080/good/7.png leads to port 8080 and /good/7.png."""
    _, _, port, *rest = handler.server.seen[-1][1].split(b" ")[1].decode().split("/")
    handler.send(302, Location=f"http://127.0.0.1:{port}/{'/'.join(rest)}")


BOMB = gzip.compress(bytes(50_000_000))
CUT = picture(1, "JPEG", (200, 150))
BEHAVIOURS: dict[str, Callable[[Handler], None]] = {
    "/404": lambda handler: handler.send(404, HTML),
    "/410": lambda handler: handler.send(410, HTML),
    "/403": lambda handler: handler.send(403, HTML),
    "/429": lambda handler: handler.send(429),
    "/429-hour": lambda handler: handler.send(429, Retry_After="3600"),
    "/429-never": lambda handler: handler.send(429, Retry_After="9" * 5000),
    "/500": lambda handler: handler.send(500),
    "/reset": reset,
    "/short": lambda handler: handler.send(200, JPEG[:-40], "image/jpeg", Content_Length=len(JPEG)),
    "/long": lambda handler: handler.send(200, CUT, "image/jpeg", Content_Length=len(CUT) - 500),
    "/endless": endless,
    "/drip": one_byte_a_second,
    "/slow-head": slow_head,
    "/loop": loop,
    "/to-private": lambda handler: handler.send(302, Location="http://10.0.0.1/a.jpg"),
    "/to-metadata": lambda handler: handler.send(301, Location="http://169.254.169.254/latest/meta-data"),
    "/to-file": lambda handler: handler.send(307, Location="file:///etc/passwd"),
    "/to-secret": lambda handler: handler.send(302, Location="http://user:secret@127.0.0.1/"),
    "/to-odd": lambda handler: handler.send(302, Location="http://shop.example\\@127.0.0.1/"),
    "/to-good": lambda handler: handler.send(308, Location="../good/7.png?token=abc"),
    "/elsewhere": elsewhere,
    "/no-location": lambda handler: handler.send(302),
    "/bomb": lambda handler: handler.send(200, BOMB, "image/png", Content_Encoding="gzip"),
    "/html": lambda handler: handler.send(200, HTML, "image/jpeg"),
    "/svg": lambda handler: handler.send(200, b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
    "/empty": lambda handler: handler.send(200, b"", "image/jpeg"),
    "/204": lambda handler: handler.send(204, Content_Length=""),
    "/broken-head": lambda handler: handler.send(200, picture(1).replace(b"IHDR", b"IHDX"), "image/png"),
    "/cut": lambda handler: handler.send(200, CUT[: len(CUT) // 2], "image/jpeg"),
    "/cut-unmarked": lambda handler: handler.send(200, CUT[: len(CUT) // 2], "image/jpeg", Content_Length=""),
    "/unmarked": lambda handler: handler.send(200, JPEG, "image/jpeg", Content_Length=""),
    "/too-large": lambda handler: handler.send(200, JPEG, "image/jpeg", Content_Length=20_000_001),
    "/no-http": lambda handler: handler.request.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "/big-number": lambda handler: handler.send(200, JPEG, Content_Length="9" * 5000),
    "/big-head": lambda handler: handler.send(200, JPEG, X_Padding="a" * 300_000),
    "/nothing": lambda handler: None,
    "/busy-once": busy_once,
    "/fails-once": fails_once,
    "/mutated": mutated,
    "/cookie": lambda handler: handler.send(302, Location="/good/3.png", Set_Cookie="session=secret"),
}


@contextmanager
def image_server(tls: ssl.SSLContext | None = None, delay: float = 0.0) -> Iterator[ImageServer]:
    """A server for the time of a `with`."""
    server = ImageServer(tls, delay)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
