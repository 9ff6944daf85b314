"""One web address, asked once: its redirects, the answer, the body as a file, and whether that is an image.

In come an address and a file to write; the file then holds a complete image, or a `UrlProblem` says why not. httpcore2
is used directly: no cookies, no authorisation, no proxies and no decompression exist at its level. Every body is taken
as it comes over the wire and counted there; one that is compressed on top is refused, so nothing is ever unpacked but
images. Knows nothing of other attempts, other addresses or the cache.

`docs/data.md` says of every reason code what to do about it.
"""

import ssl
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import httpcore2

from phi3v import __version__
from phi3v.data.address_guard import AddressError, AllowedHosts, WebAddress, parse_address, shorten
from phi3v.data.guarded_network import GuardedBackend, NetworkRefusal
from phi3v.data.image_cache import FetchFailure
from phi3v.data.images import MAX_PIXELS, begins_as_image, image_size, open_image
from phi3v.data.schema import ImageRef
from phi3v.errors import ImageError

MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_COMPRESSED = {"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"}
_TRY_AGAIN = {"url_dns", "url_connect", "url_timeout"}
_ANY_NUMBER_OF_PIXELS = 2**62
_HEADERS = [
    ("User-Agent", f"phi3v/{__version__}"),
    ("Accept", "image/jpeg, image/png, image/webp, image/gif, image/bmp, image/tiff, */*;q=0.1"),
    ("Accept-Encoding", "identity"),
]


@dataclass(frozen=True)
class FetchLimits:
    """What a download may take.

    Attributes:
        seconds: for one address in all: look-ups, connections, redirects and bodies of all its attempts. Waiting
            between attempts is not counted.
        max_bytes: of one body, as it comes over the wire.
        attempts: how often an address is asked in one call, when another time may help.
        workers: how many addresses are asked at once.
        allow_hosts: hosts that may be private, each `host` or `host:port`.
        backoff: seconds before the second attempt; doubled for each further one.
        longest_wait: a server that asks for a longer pause (Retry-After) is not asked again in this call, neither for
            this address nor for another one.
        max_pixels: images up to this size are decoded before they are kept; larger ones are kept when their header is
            sound, for rows to refuse.
    """

    seconds: float = 15.0
    max_bytes: int = 20_000_000
    attempts: int = 3
    workers: int = 16
    allow_hosts: tuple[str, ...] = ()
    backoff: float = 0.5
    longest_wait: float = 60.0
    max_pixels: int = MAX_PIXELS


class UrlProblem(Exception):
    """Why an attempt gave no image.

    Attributes:
        failure: reason code and message.
        again: True when another attempt may help.
        lasting: True when the server has said all there is to say, so that the next run need not ask.
        pause: seconds for which the server wants no requests; None when it did not say.
        host: the machine that answered, at the end of redirects, as "host:port"; "" where none did.
    """

    def __init__(
        self, failure: FetchFailure, *, again: bool = False, lasting: bool = False, pause: float | None = None
    ) -> None:
        """Keep what is known."""
        super().__init__(failure.message)
        self.failure = failure
        self.again = again
        self.lasting = lasting
        self.pause = pause
        self.host = ""


class PausedHost(Exception):
    """A machine is not asked now, because it has said that it wants no requests for a while.

    Attributes:
        machine: as "host:port".
        seconds: until it may be asked; None for not in this call.
        shown: what a message says first: "it is redirected to http://...: ", or nothing.
    """

    def __init__(self, machine: str, seconds: float | None) -> None:
        """Keep who and how long."""
        super().__init__(machine)
        self.machine = machine
        self.seconds = seconds
        self.shown = ""


class Downloader:
    """Asks for one address after the other and keeps connections between them; one for each worker.

    Args:
        limits: time, bytes, pixels.
        allowed: hosts that may be private.
        tls: certificates that are trusted.
        decoders: threads in which images are decoded; few, because a decoded image is large.
    Example: with Downloader(...) as downloader: downloader.download("https://shop.example/a.jpg", Path("a"), 15.0)
    """

    def __init__(self, limits: FetchLimits, allowed: AllowedHosts, tls: ssl.SSLContext, decoders: Executor) -> None:
        """Make the pool; nothing is connected yet."""
        self._limits = limits
        self._decoders = decoders
        self._backend = GuardedBackend(allowed)
        self._pool = httpcore2.ConnectionPool(
            ssl_context=tls,
            max_connections=4,
            max_keepalive_connections=2,
            keepalive_expiry=5.0,
            network_backend=self._backend,
        )

    def __enter__(self) -> Self:
        """The downloader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self._pool.close()

    def download(
        self, url: str, file: Path, seconds: float, *, may_ask: Callable[[str], None] = lambda machine: None
    ) -> None:
        """Writes the image behind an address into a file.

        Args:
            url: the address as the data set has it.
            file: is written, or overwritten.
            seconds: what the whole of it may take.
            may_ask: told of each machine before it is asked, those of redirects included; raises PausedHost.
        Raises: UrlProblem; PausedHost; OSError when the file cannot be written.
        """
        self._backend.give(seconds)
        shown = ""
        try:
            address = parse_address(url)
            for _ in range(MOST_REDIRECTS + 1):
                may_ask(address.machine)
                location = self._ask(address, file, url)
                if location is None:
                    return
                shown = f"it is redirected to {shorten(location)}: "
                address = address.redirected(location)
                shown = f"it is redirected to {shorten(address.text)}: "
            raise problem(
                url, "url_redirects", f"it is redirected more than {MOST_REDIRECTS} times; name the last address"
            )
        except PausedHost as paused:
            paused.shown = shown
            raise
        except AddressError as error:
            what = "that address" if shown else "the address"
            raise problem(url, "url_invalid", f"{shown}{what} {error}") from error
        except NetworkRefusal as error:
            code, words = error.reason_code, self._too_slow if error.reason_code == "url_timeout" else str(error)
            raise problem(url, code, shown + words, again=code in _TRY_AGAIN) from error
        except httpcore2.TimeoutException as error:
            raise problem(url, "url_timeout", shown + self._too_slow, again=True) from error
        except (httpcore2.ProtocolError, httpcore2.NetworkError) as error:
            raise _broken(url, shown, error) from error

    @property
    def _too_slow(self) -> str:
        """What a timeout says."""
        return f"it takes longer than the {self._limits.seconds:g} s that one address has; try again later"

    def _ask(self, address: WebAddress, file: Path, url: str) -> str | None:
        """One request. Returns: the Location of a redirect; None when the file holds an image."""
        where = httpcore2.URL(scheme=address.scheme, host=address.host, port=address.port, target=address.target)
        with self._pool.stream("GET", where, headers=[("Host", address.host_header), *_HEADERS]) as response:
            headers = _headers(response)
            if response.status in _REDIRECTS and "location" in headers:
                return headers["location"]
            if response.status != 200:
                refusal = _status_problem(url, response.status, headers)
                refusal.host = address.machine
                raise refusal
            packed = _COMPRESSED & {word.strip().lower() for word in headers.get("content-encoding", "").split(",")}
            if packed:
                words = f"the server compresses it ({packed.pop()}) although it was asked not to; save it as a file"
                raise problem(url, "url_encoded", words)
            length = int(headers["content-length"]) if headers.get("content-length", "").isdecimal() else None
            with open(file, "wb") as written:
                self._receive(response, length, written, url)
        marked = length is not None or "transfer-encoding" in headers
        kind = headers.get("content-type", "")
        self._decoders.submit(_check_image, url, file, self._limits.max_pixels, kind, end_was_marked=marked).result()
        return None

    def _receive(self, response: httpcore2.Response, length: int | None, written: BinaryIO, url: str) -> None:
        """The body into a file, up to the limit."""
        most = self._limits.max_bytes
        received = 0
        too_large = problem(url, "url_too_large", f"it has more than {most:,} bytes; save a smaller file")
        if length is not None and length > most:
            raise too_large
        try:
            for chunk in response.iter_stream():
                received += len(chunk)
                if received > most:
                    raise too_large
                written.write(chunk)
        except httpcore2.RemoteProtocolError as error:
            if length is None:
                raise problem(url, "url_reset", f"it broke off after {received:,} bytes", again=True) from error
            words = f"{received:,} of the {length:,} bytes that the server announced arrived"
            raise problem(url, "url_length", words, again=True) from error
        if not received:
            raise problem(url, "url_empty", "the server answers 200 and sends nothing; mend the address")


def problem(
    url: str, code: str, words: str, *, again: bool = False, lasting: bool = False, pause: float | None = None
) -> UrlProblem:
    """A problem whose line begins with the address: "image https://shop.example/a.jpg: the server answers 404 ..."."""
    line = " ".join(f"image {shorten(url)}: {words}".split())
    return UrlProblem(FetchFailure(code, line), again=again, lasting=lasting, pause=pause)


def _headers(response: httpcore2.Response) -> dict[str, str]:
    """Headers by lower-case name; values of the same name joined by commas."""
    found: dict[str, str] = {}
    for name, value in response.headers:
        key = name.decode("latin-1").lower()
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            text = value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def _status_problem(url: str, status: int, headers: dict[str, str]) -> UrlProblem:
    """What an answer other than 200 means."""
    if status in (404, 410):
        code, words = ("url_not_found", "there is no such file") if status == 404 else ("url_gone", "it was taken away")
        return problem(
            url, code, f"the server answers {status}, {words}; mend the address or drop the row", lasting=True
        )
    if status == 429 or status >= 500:
        code, words = (
            ("url_busy", "too many requests") if status == 429 else ("url_server", "it has a fault of its own")
        )
        pause = _retry_after(headers.get("retry-after", ""))
        return problem(url, code, f"the server answers {status}, {words}; try again later", again=True, pause=pause)
    words = f"the server answers {status}; look whether the address opens without signing in"
    return problem(url, "url_refused", words, again=status in (408, 425))


def _retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header: "120" -> 120.0; a date -> the time until then; None for anything else."""
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return None


def _broken(url: str, shown: str, error: Exception) -> UrlProblem:
    """What a connection that broke or an answer that is no HTTP means."""
    if isinstance(error, httpcore2.ConnectError):
        return problem(url, "url_connect", f"{shown}no connection ({error})", again=True)
    if isinstance(error, httpcore2.NetworkError) or "disconnected" in str(error):
        return problem(url, "url_reset", f"{shown}the server broke off the connection", again=True)
    what = str(error).partition(":")[0][:100]  # behind the colon the server's own bytes are quoted
    return problem(url, "url_protocol", f"{shown}the answer is no valid HTTP ({what})")


def _check_image(url: str, file: Path, max_pixels: int, content_type: str, *, end_was_marked: bool) -> None:
    """Looks at what was received. Raises: UrlProblem when it is no image, or breaks off.

    Args:
        url: for messages.
        file: what was received.
        max_pixels: larger images are not decoded here.
        content_type: what the server calls it; used to explain, never to decide.
        end_was_marked: False for a body that ends with its connection, whose end may have been cut off on the way.
    """
    image = ImageRef(shorten(url), file.read_bytes())
    try:
        width, height = image_size(image, max_pixels=_ANY_NUMBER_OF_PIXELS)
    except ImageError as error:
        if _is_html(image.data or b"", content_type):
            words = "a web page, no image; open the address in a browser, and name the image's own address"
            raise problem(url, "url_html", words, lasting=True) from error
        damaged = begins_as_image((image.data or b"")[:16])
        failure = FetchFailure("url_damaged" if damaged else "url_not_image", str(error))
        raise UrlProblem(
            failure, again=damaged and not end_was_marked, lasting=end_was_marked or not damaged
        ) from error
    if width * height > max_pixels:
        return
    try:
        open_image(image, max_pixels=max_pixels)
    except ImageError as error:
        failure = FetchFailure("url_damaged", str(error))
        raise UrlProblem(failure, again=not end_was_marked, lasting=end_was_marked) from error


def _is_html(data: bytes, content_type: str) -> bool:
    """Whether a body that is no image looks like a web page."""
    head = data[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return head.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")) or "html" in content_type
