"""Which addresses are asked: every spelling of a machine that is not public ends without a connection."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_server import ImageServer, image_server

from phi3v.data.address_guard import AddressError, AllowedHosts, WebAddress, is_public, parse_address, shorten
from phi3v.data.fetch import FetchLimits, fetch_images
from phi3v.data.image_cache import ImageCache
from phi3v.errors import ConfigError

# PORT is that of a server on 127.0.0.1, which would answer.
PRIVATE = """
http://127.0.0.1:PORT/good/1.png            http://127.0.0.1.:PORT/good/1.png           http://127.1.2.3:PORT/good/1.png
http://0.0.0.0:PORT/good/1.png              http://10.0.0.1/a.png                       http://172.16.0.1/a.png
http://172.31.255.255/a.png                 http://192.168.1.1/a.png                    http://169.254.169.254/latest/
http://169.254.170.2/v2/credentials         http://100.100.100.200/latest/              http://192.0.0.192/opc/v2/
http://168.63.129.16/machine                http://100.64.0.1/a.png                     http://198.18.0.1/a.png
http://224.0.0.1/a.png                      http://240.0.0.1/a.png                      http://255.255.255.255/a.png
http://127。0。0。1:PORT/good/1.png         http://127．0．0．1:PORT/good/1.png          http://127｡0｡0｡1:PORT/good/1.png
http://[::1]:PORT/good/1.png                http://[0:0:0:0:0:0:0:1]:PORT/good/1.png    http://[::]:PORT/good/1.png
http://[::ffff:127.0.0.1]:PORT/good/1.png   http://[::ffff:7f00:1]:PORT/good/1.png      http://[::127.0.0.1]:PORT/a.png
http://[::ffff:0:127.0.0.1]:PORT/a.png      http://[64:ff9b::127.0.0.1]:PORT/a.png      http://[64:ff9b::a9fe:a9fe]/
http://[64:ff9b:1::1]/a.png                 http://[2002:7f00:1::1]:PORT/good/1.png     http://[2002:a9fe:a9fe::]/
http://[2001:0:7f00:1::]/a.png              http://[2001::8000:0:80ff:fffe]/a.png       http://[fe80::1]:PORT/good/1.png
http://[fd00:ec2::254]/latest/              http://[fd20:ce::254]/computeMetadata/      http://[fc00::1]/a.png
http://[fec0::1]/a.png                      http://[ff02::1]/a.png                      http://[100::1]/a.png
http://[2001:db8::1]/a.png                  http://localhost:PORT/good/1.png            http://LOCALHOST.:PORT/good/1.png
http://a.localhost:PORT/good/1.png          http://localhost.localdomain:PORT/          http://ip6-localhost:PORT/
http://metadata.google.internal/            http://127.0.0.1.nip.example:PORT/          http://metadata/
""".split()
NOT_AN_ADDRESS = r"""
http://2130706433:PORT/good/1.png           http://017700000001:PORT/good/1.png         http://0x7f000001:PORT/good/1.png
http://0177.0.0.1:PORT/good/1.png           http://0x7f.0.0.1:PORT/good/1.png           http://0x7f.1:PORT/good/1.png
http://127.1:PORT/good/1.png                http://127.0.1:PORT/good/1.png              http://0:PORT/good/1.png
http://00000177.0x0.0.1:PORT/               http://0X7F.0.0.1:PORT/good/1.png           http://127.0.0.0x1:PORT/a.png
http://127.0.0.1.0:PORT/good/1.png          http://127.0.0.01:PORT/good/1.png           http://4294967297:PORT/a.png
http://256.0.0.1:PORT/good/1.png            http://127.0.0.1..:PORT/good/1.png          http://.127.0.0.1:PORT/a.png
http://user@127.0.0.1:PORT/good/1.png       http://user:pw@127.0.0.1:PORT/good/1.png    http://shop.example@127.0.0.1:PORT/
http://127.0.0.1:PORT@shop.example/         http://shop.example\@127.0.0.1:PORT/a.png  http://127.0.0.1:PORT\.shop.example/
http:\\127.0.0.1:PORT/good/1.png          http:/\127.0.0.1:PORT/good/1.png           http://127.0.0.1TAB:PORT/a.png
http://１２７.0.0.1:PORT/good/1.png         http://①②⑦.0.0.1:PORT/good/1.png           http://ⓛocalhost:PORT/a.png
http://ｌocalhost:PORT/good/1.png           http://127%2e0%2e0%2e1:PORT/good/1.png      http://%31%32%37.0.0.1:PORT/
http://127.0.0.1%00.shop.example:PORT/      http://[::1%25lo]:PORT/good/1.png           http://[fe80::1%25eth0]:PORT/
http://[fe80::1%lo]:PORT/good/1.png         http://[::1]shop.example:PORT/              http://[::1:PORT/good/1.png
http://[127.0.0.1]:PORT/good/1.png          http://127.0.0.1:99999999/a.png             http:///127.0.0.1:PORT/
http:127.0.0.1:PORT/good/1.png              //127.0.0.1:PORT/good/1.png                 127.0.0.1:PORT/good/1.png
file:///etc/passwd                          ftp://127.0.0.1:PORT/a.png                  gopher://127.0.0.1:PORT/_GET
unix:///var/run/docker.sock                 data:image/png;base64,AAAA                  javascript:alert(1)
jar:http://127.0.0.1:PORT/!/a               http+unix://%2fvar%2frun%2fdocker.sock/     HTTP://127.0.0.1:PORT\a
"""
NOT_AN_ADDRESS = [text.replace("TAB", "\t") for text in NOT_AN_ADDRESS.split()]

HOSTS = {  # what the name server of these tests says
    "localhost": ["127.0.0.1", "::1"],
    "a.localhost": ["127.0.0.1"],
    "localhost.localdomain": ["127.0.0.1"],
    "ip6-localhost": ["::1"],
    "metadata.google.internal": ["169.254.169.254"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
    "metadata": ["fe80::1%eth0"],
    "public.example": ["203.0.114.1"],
    "mixed.example": ["203.0.114.1", "127.0.0.1"],
    "mixed-last.example": ["203.0.114.1", "2606:4700::1", "fd00::1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "empty.example": [],
}


class Connections(list):
    """Every address that a socket was connected to, or asked to be."""


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with image_server() as running:
        yield running


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Connections:
    """No socket connects any more except to 127.0.0.1; names are those of HOSTS."""
    made = Connections()
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def counted(self: socket.socket, address: tuple) -> None:
        made.append(address[0])
        if address[0] != "127.0.0.1":
            raise ConnectionRefusedError(111, "Connection refused")
        connect(self, address)

    def answers(host: str, port: int, *args: object, **more: object) -> list:
        if host in HOSTS:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in HOSTS[host]]
        if host.replace(".", "").isdecimal() or ":" in host:
            return look_up(host, port, *args, **more)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket.socket, "connect", counted)
    monkeypatch.setattr(socket, "getaddrinfo", answers)
    return made


def reason(url: str, folder: Path, *allow_hosts: str) -> str:
    limits = FetchLimits(seconds=5, attempts=1, allow_hosts=allow_hosts)
    failures = fetch_images([url], ImageCache(folder), limits).failures
    return failures[url].reason_code if url in failures else ""


def test_there_are_enough_spellings() -> None:
    assert len(set(PRIVATE)) >= 50 and len(set(NOT_AN_ADDRESS)) >= 50


def test_no_spelling_of_a_private_machine_makes_a_connection(
    server: ImageServer, connections: Connections, tmp_path: Path
) -> None:
    urls = {text.replace("PORT", str(server.port)): "url_private" for text in PRIVATE}
    urls |= {text.replace("PORT", str(server.port)): "url_invalid" for text in NOT_AN_ADDRESS}
    failures = fetch_images(urls, ImageCache(tmp_path), FetchLimits(seconds=5, attempts=1)).failures
    assert {url: failures[url].reason_code for url in failures} == urls
    assert (connections, server.connections) == ([], 0)


def test_the_same_server_answers_where_it_is_allowed(
    server: ImageServer, connections: Connections, tmp_path: Path
) -> None:
    """The counters of these tests can count."""
    assert reason(server.url("/good/1.png"), tmp_path, f"127.0.0.1:{server.port}") == ""
    assert (connections, server.connections) == (["127.0.0.1"], 1)


@pytest.mark.parametrize(
    ("host", "code", "connected"),
    [
        ("public.example", "url_connect", ["203.0.114.1"]),
        ("mixed.example", "url_private", []),
        ("mixed-last.example", "url_private", []),
        ("nat64.example", "url_private", []),
        ("empty.example", "url_dns", []),
        ("unknown.example", "url_dns", []),
    ],
)
def test_all_answers_of_the_name_server_are_checked(
    host: str, code: str, connected: list[str], connections: Connections, tmp_path: Path
) -> None:
    assert (reason(f"http://{host}/a.png", tmp_path), connections) == (code, connected)


def test_an_answer_that_changes_is_asked_for_once(
    server: ImageServer, connections: Connections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public for the check and private for the connection would be rebinding; the answer that was checked is used."""
    answers = [["203.0.114.1"], ["127.0.0.1"], ["127.0.0.1"]]
    monkeypatch.setitem(HOSTS, "rebinding.example", [])
    known = socket.getaddrinfo

    def changing(host: str, *args: object, **more: object) -> list:
        if host == "rebinding.example":
            HOSTS[host] = answers.pop(0)
        return known(host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    url = f"http://rebinding.example:{server.port}/good/1.png"
    assert reason(url, tmp_path) == "url_connect"
    assert (connections, server.connections, len(answers)) == (["203.0.114.1"], 0, 2)
    assert reason(url, tmp_path) == "url_private"
    assert (connections, server.connections, len(answers)) == (["203.0.114.1"], 0, 1)


@pytest.mark.parametrize("path", ["/to-private", "/to-metadata"])
def test_a_redirect_is_checked_as_the_first_address_is(
    path: str, server: ImageServer, connections: Connections, tmp_path: Path
) -> None:
    assert reason(server.url(path), tmp_path, "127.0.0.1") == "url_private"
    assert connections == ["127.0.0.1"]


def test_allowing_one_port_allows_no_other(server: ImageServer, connections: Connections, tmp_path: Path) -> None:
    assert reason(server.url("/good/1.png"), tmp_path, f"127.0.0.1:{server.port + 1}") == "url_private"
    assert reason(server.url("/good/1.png", "localhost"), tmp_path, "127.0.0.1") == "url_private"
    assert connections == []


def test_public_addresses() -> None:
    public = "1.1.1.1 8.8.8.8 172.32.0.1 100.128.0.1 192.0.1.1 2606:4700::1111 2a00:1450::1 64:ff9b::101:101".split()
    assert [address for address in public if not is_public(address)] == []
    assert not is_public("shop.example") and not is_public("2606:4700::1%eth0") and not is_public("::ffff:1.1.1.1")


def test_an_address_taken_apart() -> None:
    text = "HTTP://Shop.example./a b.jpg?w=2#top"
    assert parse_address(text) == WebAddress("http", "shop.example", 80, "/a%20b.jpg?w=2", text)
    assert parse_address("https://münchen.example").host == "xn--mnchen-3ya.example"
    assert parse_address("https://[2606:4700:0::1]:8443/a").host_header == "[2606:4700::1]:8443"
    assert parse_address("https://shop.example:443/a").host_header == "shop.example"
    assert (
        parse_address("https://shop.example/a/b").redirected("//cdn.example/c?d=1").text == "https://cdn.example/c?d=1"
    )
    assert parse_address("https://shop.example/a/b").redirected("c").target == "/a/c"
    with pytest.raises(AddressError, match="has 9019 characters, more than 8192"):
        parse_address("http://shop.example" + "a" * 9000)


def test_allowed_hosts() -> None:
    allowed = AllowedHosts.parse(["Images.intern", "127.0.0.1:80", "[::1]:8080", "[fd00::1]"])
    assert allowed.entries == {("images.intern", None), ("127.0.0.1", 80), ("::1", 8080), ("fd00::1", None)}
    for entry in ("http://shop.example", "shop.example/a", "me@shop.example", "127.1", "", "a b"):
        with pytest.raises(ConfigError, match=r"^data\.allow_hosts: .*; write host or host:port"):
            AllowedHosts.parse([entry])


@pytest.mark.parametrize(
    ("url", "short"),
    [
        ("https://me:pw@shop.example/a.jpg?token=abc#x", "https://shop.example/a.jpg?..."),
        ("https://me:p@w@shop.example/a.jpg", "https://shop.example/a.jpg"),
        ("https://shop.example/a.jpg#token", "https://shop.example/a.jpg"),
        ("http://a\nb\x1b[31m", "http://a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}[31m"),
        ("https://shop.example/" + "a" * 200, "https://shop.example/" + "a" * 76 + "..."),
    ],
)
def test_messages_call_an_address_without_its_secrets(url: str, short: str) -> None:
    assert shorten(url) == short
