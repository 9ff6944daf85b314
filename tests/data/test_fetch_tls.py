"""TLS: certificates are verified against the host's name, which is kept although an address is connected to."""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import make_certificates
from image_server import ImageServer, image_server, picture

from phi3v.data.fetch import FetchLimits, fetch_images
from phi3v.data.image_cache import ImageCache

HOSTS = ("shop.example", "other.example")
LIMITS = FetchLimits(seconds=10, attempts=1, allow_hosts=HOSTS)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def server(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageServer]:
    """A server with that certificate, which both hosts lead to; `names` are those that clients asked for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: look_up("127.0.0.1" if host in HOSTS else host, *rest, **more),
    )
    with image_server(context) as running:
        running.names = []
        context.sni_callback = lambda connection, name, _: running.names.append(name)
        yield running


def reason(url: str, folder: Path) -> str:
    failures = fetch_images([url], ImageCache(folder), LIMITS).failures
    return f"{failures[url].reason_code}: {failures[url].message.partition(': ')[2]}" if url in failures else ""


def test_a_trusted_authority_and_the_right_name(
    server: ImageServer, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    url = server.url("/good/5.png", "shop.example")
    assert reason(url, tmp_path) == ""
    assert ImageCache(tmp_path).path(url).read_bytes() == picture(5)
    assert server.names == ["shop.example"]
    assert f"\r\nHost: shop.example:{server.port}\r\n".encode() in server.seen[0][1]


def test_another_name_is_refused(
    server: ImageServer, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    said = reason(server.url("/good/5.png", "other.example"), tmp_path)
    assert said.startswith("url_tls: its certificate is refused: Hostname mismatch")
    assert (server.names, server.seen) == (["other.example"], [])


def test_an_authority_that_nobody_knows_is_refused(server: ImageServer, tmp_path: Path) -> None:
    said = reason(server.url("/good/5.png", "shop.example"), tmp_path)
    assert said.startswith("url_tls: its certificate is refused: unable to get local issuer certificate")
    assert server.seen == []


def test_a_server_without_tls(tmp_path: Path) -> None:
    limits = FetchLimits(seconds=10, allow_hosts=("127.0.0.1",))
    with image_server() as server:
        url = server.url("/good/5.png").replace("http:", "https:")
        failures = fetch_images([url], ImageCache(tmp_path), limits).failures
    assert failures[url].reason_code == "url_tls"
