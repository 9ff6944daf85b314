"""Images of requests: data URLs as they are, web addresses of allowed hosts over https alone, and nothing else."""

import base64
import socket
import ssl
from pathlib import Path

import pytest
from certificates import make_certificates
from image_server import image_server, picture

from phi3v.errors import ConfigError
from phi3v.serve.images import ImageSource
from phi3v.serve.protocol import Refusal


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def refusal(source: ImageSource, url: str) -> str:
    with pytest.raises(Refusal) as caught:
        source.bytes_of([url])
    assert caught.value.status == 400 and "127.0.0.1" not in str(caught.value)
    return str(caught.value)


def test_data_urls() -> None:
    source = ImageSource(seconds=1, max_bytes=1000)
    text = base64.b64encode(b"hello").decode()
    urls = [
        f"data:image/png;base64,{text}",
        f"DATA:image/svg+xml;BASE64,{text}",
        f"data:image/x;base64,{text.rstrip('=')}",
    ]
    assert source.bytes_of(urls) == [b"hello"] * 3
    for url, says in {
        "data:image/png,hello": "is no data URL of the form",
        "data:text/html;base64,aGk=": "is no data URL of the form",
        "data:image/png;base64,": "is empty",
        "data:image/png;base64,a": "is no valid base64",
        "data:image/png;base64,aGk=\n": "is no valid base64",
        "data:image/png;base64,\u00e4": "is no valid base64",
        "": "is neither",
        "/etc/passwd": "is neither",
        "file:///etc/passwd": "is neither",
        "http://shop.example/a.png": "is neither",
        "ftp://shop.example/a.png": "is neither",
        "https://shop.example/a.png": "may not ask",
        "https://user:secret@shop.example/a.png": "has no valid https address",
        "https://127.0.0.1/a.png": "may not ask",
        "https://127.1/a.png": "has no valid https address",
        "https://[::1]/": "may not ask",
        "https://": "has no valid https address",
    }.items():
        assert says in refusal(source, url), url


def test_a_host_that_is_never_fetched_from_cannot_be_allowed() -> None:
    for host in (
        "10.0.0.1",
        "192.168.1.2:8443",
        "[::1]",
        "169.254.169.254",
        "LOCALHOST:443",
        "nas",
        "router.:8443",
        "printer.lan",
        "nas.local",
        "x.internal.",
    ):
        with pytest.raises(
            ConfigError, match=r"^--allow-host [a-z0-9.:]+: images are fetched from public addresses alone"
        ):
            ImageSource(["photos.example", host], seconds=1, max_bytes=1)
    ImageSource(
        ["photos.example", "local.example", "photos.notlocal", "1.1.1.1:443", "[2606:4700::1]"], seconds=1, max_bytes=1
    )


def test_only_allowed_hosts_at_public_addresses_over_https(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's server has a private address, which a source outside of tests has no way to allow."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    look_up = socket.getaddrinfo
    here = lambda host, *rest, **more: look_up("127.0.0.1" if "example" in str(host) else host, *rest, **more)  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", here)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    with image_server(context) as server:
        host = f"shop.example:{server.port}"
        trusted = ImageSource([host], seconds=5, max_bytes=100_000, private=[host])
        assert trusted.bytes_of([f"https://{host}/good/1.png"]) == [picture(1)]
        assert "url_not_found" in refusal(trusted, f"https://{host}/404")
        before = server.connections
        for url in (f"https://other.example:{server.port}/good/1.png", "https://shop.example/good/1.png"):
            assert "may not ask" in refusal(trusted, url)
        assert server.connections == before, "a host that was not allowed was asked"
        seen = len(server.seen)
        for path in ("to-private", "to-metadata", "to-file", "to-secret", f"elsewhere/{server.port}/good/7.png"):
            assert "could not be fetched" in refusal(trusted, f"https://{host}/{path}")
        assert len(server.seen) == seen + 5, "a redirect was followed to a host that was not allowed"
        strict = ImageSource([host], seconds=5, max_bytes=100_000)
        assert "could not be fetched: its host has an address that is not public (url_private)" in refusal(
            strict, f"https://{host}/good/1.png"
        )
        small = ImageSource([host], seconds=5, max_bytes=50, private=[host])
        assert "it has more than 50 bytes (url_too_large)" in refusal(small, f"https://{host}/good/1.png")
