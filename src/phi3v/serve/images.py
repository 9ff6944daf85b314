"""From the `image_url` of a request to the bytes of an encoded image: data URLs, and https of hosts that were allowed.

Nothing is decoded here: bytes go to the worker as they are. No path is ever opened. A web address is asked only where
its host was allowed by name, over https, at a public address (see `data.address_guard`), redirects included. Knows no
models and no HTTP of the server.
"""

import base64
import binascii
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpcore2

from phi3v.data.address_guard import AddressError, AllowedHosts, is_literal, is_public, parse_address
from phi3v.data.download import Downloader, FetchLimits, problem
from phi3v.data.download import UrlProblem as FetchProblem
from phi3v.errors import ConfigError
from phi3v.serve.protocol import Refusal

_DATA_URL = re.compile(r"data:image/[a-zA-Z0-9.+-]{1,40};base64,", re.IGNORECASE)
_HTTPS_PORT = 443
_LOCAL_NAMES = tuple(
    ".localhost .local .internal .home.arpa .localdomain .lan .home .corp .intranet .private .mail".split()
)
"""How names end that lead to no public address: reserved, or never given out because private networks use them."""
_FETCHES = {
    "url_private": "its host has an address that is not public",
    "url_dns": "the name of its host is not known",
    "url_connect": "nobody answers there",
    "url_tls": "its certificate is refused, or TLS fails",
    "url_timeout": "it did not come whole within the {seconds:g} s that all images of a request have",
    "url_busy": "its server has too many requests: try again later",
    "url_server": "its server has a fault: try again later",
    "url_refused": "its server does not give it out, or redirects to a host that may not be asked",
    "url_not_found": "it is not there",
    "url_gone": "it is no longer there",
    "url_redirects": "it is redirected too often",
    "url_reset": "the connection broke: try again",
    "url_length": "fewer bytes came than were announced: try again",
    "url_protocol": "the answer is no valid HTTP",
    "url_too_large": "it has more than {bytes} bytes",
    "url_encoded": "it came compressed on top, which was not asked for",
    "url_empty": "it is empty",
    "url_html": "it is a web page: name the image's own address",
    "url_not_image": "it is of no image format that is read",
    "url_damaged": "it does not decode",
    "url_invalid": "it is redirected to what is no web address",
}
"""Codes of downloads in words that tell nothing of networks or servers but what the address' owner may know."""


class ImageSource:
    """Where images of requests may come from.

    Args:
        hosts: hosts that may be asked, `host` (at port 443) or `host:port`; none by default.
        seconds: for all addresses of a request.
        max_bytes: of one image.
        private: hosts that may have private addresses: none, except in tests.

    Raises: ConfigError for a host in another form, and for one that has no public address.
    """

    def __init__(
        self, hosts: Iterable[str] = (), *, seconds: float, max_bytes: int, private: Iterable[str] = ()
    ) -> None:
        """Nothing is asked yet."""
        try:
            self._allowed = AllowedHosts.parse(hosts)
        except ConfigError as error:  # the words are those of a recipe
            raise ConfigError(str(error).replace("data.allow_hosts", "--allow-host")) from error
        for host, _ in sorted(self._allowed.entries, key=str):
            if _is_local(host):
                raise ConfigError(
                    f"--allow-host {host}: images are fetched from public addresses alone, and this is none; leave it "
                    "out, and send its images as data URLs"
                )
        self._private = AllowedHosts.parse(private)
        self._limits = FetchLimits(seconds=seconds, max_bytes=max_bytes, attempts=1, max_pixels=0)
        self._tls = httpcore2.default_ssl_context()
        self._decoder = ThreadPoolExecutor(1, "header")

    def bytes_of(self, addresses: Sequence[str]) -> list[bytes]:
        """The images of a request, one by one. Raises: Refusal with status 400."""
        until = time.monotonic() + self._limits.seconds
        return [self._one(address, number, until) for number, address in enumerate(addresses, start=1)]

    def _one(self, address: str, number: int, until: float) -> bytes:
        """One image; `number` counts from 1, and what is fetched is there by `until`."""
        if (head := _DATA_URL.match(address)) is not None:
            return _decoded(address[head.end() :], number)
        if address[:5].lower() == "data:":
            raise _refused(number, "is no data URL of the form data:image/png;base64,...")
        if address[:8].lower() != "https://":
            raise _refused(number, "is neither a data URL (data:image/png;base64,...) nor an https address")
        return self._fetched(address, number, until - time.monotonic())

    def _fetched(self, address: str, number: int, seconds: float) -> bytes:
        """An image from the web; each machine on the way must have been allowed."""
        try:
            self._check(parse_address(address).machine, number)
        except AddressError as error:
            raise _refused(number, "has no valid https address") from error

        def may_ask(machine: str) -> None:
            try:
                self._check(machine, number)
            except Refusal as error:
                raise problem(address, "url_refused", "redirected") from error

        with tempfile.TemporaryDirectory(prefix="phi3v-") as folder:
            file = Path(folder) / "image"
            try:
                with Downloader(self._limits, self._private, self._tls, self._decoder) as downloader:
                    downloader.download(address, file, seconds, may_ask=may_ask)
            except FetchProblem as error:  # its line may hold what a name server says, which is nobody's business
                raise _refused(number, self._told(error.failure.reason_code)) from error
            return file.read_bytes()

    def _told(self, code: str) -> str:
        """Example: "url_tls" -> "could not be fetched: its certificate is refused, or TLS fails (url_tls)"."""
        if (words := _FETCHES.get(code)) is None:
            return f"could not be fetched ({code})"
        limits = {"seconds": self._limits.seconds, "bytes": self._limits.max_bytes}
        return f"could not be fetched: {words.format(**limits)} ({code})"

    def _check(self, machine: str, number: int) -> None:
        """Raises: Refusal for a machine that was not allowed; an entry without a port allows 443."""
        host, _, port = machine.rpartition(":")
        if (host, int(port)) in self._allowed.entries:
            return
        if int(port) == _HTTPS_PORT and (host, None) in self._allowed.entries:
            return
        raise _refused(number, "lies at a host that this server may not ask: send it as a data URL")


def _is_local(host: str) -> bool:
    """Whether a host is a private address, or a name that no public server has (RFC 6761, 6762 and 8375, ICANN).

    Example: "10.0.0.1", "::1", "nas" and "nas.lan" -> True; "photos.example" -> False, whatever it resolves to.
    """
    if is_literal(host):
        return not is_public(host)
    return "." not in host or host.endswith(_LOCAL_NAMES)


def _decoded(text: str, number: int) -> bytes:
    """The bytes of a data URL: "aGk=" -> b"hi"; the padding may be missing."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(number, "is no valid base64") from error
    if not data:
        raise _refused(number, "is empty")
    return data


def _refused(number: int, words: str) -> Refusal:
    """Example: "image 2 is no valid base64"."""
    return Refusal(400, "invalid_image", f"image {number} {words}")
