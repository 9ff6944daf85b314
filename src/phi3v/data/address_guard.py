"""Which web addresses may be asked, and which machines may be connected to.

In comes the text of an address; out comes a `WebAddress`, whose host is a name or an IP address in its one spelling,
or an `AddressError`. httpx2's parser reads the text once, and what it read is what is checked, resolved and connected
to: no second parser sees the text. Opens no connection and asks no name server; `guarded_network` does, with these
rules.

| part | rule |
|---|---|
| scheme | http or https |
| user and password | refused: a data set is no place for a secret |
| control characters, backslash | refused: programs disagree on where the host ends |
| host | a name, four decimal numbers or an IPv6 address in brackets; no 127.1, 2130706433, 0x7f.1, no zone (%eth0) |
| dot at the end of a name | taken off; dots of other scripts (U+3002) are dots; full-width letters are refused |
| IPv4 | public ones; private, loopback, link-local, shared, reserved, multicast and cloud-internal ones are not |
| IPv6 | global unicast without 6to4, Teredo, documentation; for NAT64 (64:ff9b::/96) the IPv4 address inside decides |
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpx2

from phi3v.errors import ConfigError

MEND = "mend the address"
"""How the line about an address ends that nobody should allow."""

_CLOSED_V4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by customers of a provider; also a cloud's metadata (100.100.100.200)
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # a cloud's own services, although the number is a public one
        "169.254.0.0/16",  # link-local; also most clouds' metadata (169.254.169.254)
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; also a cloud's metadata (192.0.0.192)
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_OPEN_V6 = IPv6Network("2000::/3")
"""Global unicast; outside lie loopback, mapped, private (fc00::/7), link-local, multicast and unassigned addresses."""
_CLOSED_V6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments, Teredo (2001::/32) among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",  # documentation
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")
_OF_CLOUDS = {"168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"}
"""Metadata and services of clouds that are not link-local: never offered for `data.allow_hosts`."""
_MOST_CHARACTERS = 8192
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\\u2028\u2029]")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class AddressError(ValueError):
    """A text that is no usable web address; the text of the error continues "image URL: ..."."""


@dataclass(frozen=True, slots=True)
class WebAddress:
    """A web address, taken apart.

    Example: parse_address("HTTP://Shop.example./a b.jpg?w=2#top") is
        WebAddress("http", "shop.example", 80, "/a%20b.jpg?w=2", "http://Shop.example./a b.jpg?w=2#top")

    Attributes:
        scheme: "http" or "https".
        host: lower case and ASCII; an IPv6 address without brackets.
        port: 1 to 65535.
        target: path and query as the request line holds them.
        text: what was parsed; relative redirects count from it.
    """

    scheme: str
    host: str
    port: int
    target: str
    text: str

    @property
    def host_header(self) -> str:
        """What the request calls the host: "shop.example", "shop.example:8080", "[2606:4700::1]"."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def machine(self) -> str:
        """Who is asked, whatever the scheme: "shop.example:443"."""
        return f"{self.host}:{self.port}"

    def redirected(self, location: str) -> "WebAddress":
        """Where a Location header leads. Raises: AddressError as `parse_address` does."""
        if _FORBIDDEN.search(location):
            raise AddressError("holds a control character or a backslash")
        try:
            joined = str(httpx2.URL(self.text.strip(" ")).join(location.strip(" ")))
        except (httpx2.InvalidURL, ValueError) as error:
            raise AddressError(f"is no valid web address ({_words(error)})") from error
        return parse_address(joined)


def parse_address(text: str) -> WebAddress:
    """A web address in its one spelling.

    Example: "http://127。0。0。1:8000/a.jpg" -> host "127.0.0.1", port 8000; whether it may be asked is `is_public`.
    Raises: AddressError for everything the table above refuses.
    """
    if len(text) > _MOST_CHARACTERS:
        raise AddressError(f"has {len(text)} characters, more than {_MOST_CHARACTERS}")
    if _FORBIDDEN.search(text):
        raise AddressError("holds a control character or a backslash")
    try:
        url = httpx2.URL(text.strip(" "))
    except (httpx2.InvalidURL, ValueError) as error:
        raise AddressError(f"is no valid web address ({_words(error)})") from error
    if url.scheme not in _DEFAULT_PORTS:
        raise AddressError(f"begins with {url.scheme[:20] or 'no scheme'}, and only http and https are asked")
    if url.userinfo:
        raise AddressError("holds a user name or password")
    port = _DEFAULT_PORTS[url.scheme] if url.port is None else url.port
    if not 1 <= port <= 65535:
        raise AddressError(f"has the port {port}, which there is not")
    host = _host(url.raw_host.decode("ascii"))
    return WebAddress(url.scheme, host, port, url.raw_path.decode("ascii") or "/", text)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet.

    Example: "1.1.1.1" -> True; "10.0.0.1", "::ffff:1.1.1.1", "fe80::1%eth0" and "64:ff9b::7f00:1" -> False.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv4Address):
        return not any(parsed in network for network in _CLOSED_V4)
    if parsed.scope_id is not None:
        return False
    if parsed in _NAT64:
        return is_public(str(IPv4Address(parsed.packed[-4:])))
    return parsed in _OPEN_V6 and not any(parsed in network for network in _CLOSED_V6)


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """Hosts that may be private.

    Example: AllowedHosts.parse(["images.intern", "127.0.0.1:8000"]) holds the first at any port, the second at one.

    Attributes:
        entries: (host, port), with None for any port.
    """

    entries: frozenset[tuple[str, int | None]] = frozenset()

    @classmethod
    def parse(cls, hosts: Iterable[str]) -> "AllowedHosts":
        """From `host` and `host:port`. Raises: ConfigError naming the entry that is neither."""
        entries = set()
        for text in hosts:
            try:
                if re.search(r"[/?#@\s]", text):
                    raise AddressError("holds more than a host")
                address = parse_address(f"http://{text}/")
            except AddressError as error:
                raise ConfigError(
                    f"data.allow_hosts: {text[:100]!r} {error}; write host or host:port: images.example:8080"
                ) from error
            entries.add((address.host, address.port if re.search(r":\d+$", text.rpartition("]")[2]) else None))
        return cls(frozenset(entries))

    def hold(self, host: str, port: int) -> bool:
        """Whether this host was allowed at this port."""
        return (host, None) in self.entries or (host, port) in self.entries

    def refusal(self, host: str, port: int, address: str) -> str | None:
        """Why a host must not be asked at an IP address that it has; None when it may be.

        Example: AllowedHosts().refusal("10.0.0.1", 80, "10.0.0.1") -> '10.0.0.1 is no public address; if the machine is
        yours, allow it: data.allow_hosts: ["10.0.0.1:80"]'; nobody's photos lie at a link-local address or at a cloud's
        own services, so that none is offered there.
        """
        if self.hold(host, port) or is_public(address):
            return None
        name = host if address == host else f"{host} is {address}, which"
        if _is_link_local(address):
            return f"{name} is link-local, where clouds answer with their metadata; {MEND}"
        if address in _OF_CLOUDS:
            return f"{name} is a service of the cloud itself, which answers with its metadata; {MEND}"
        entry = f'"[{host}]:{port}"' if ":" in host else f'"{host}:{port}"'
        return f"{name} is no public address; if the machine is yours, allow it: data.allow_hosts: [{entry}]"


def is_literal(host: str) -> bool:
    """Whether a host is an IP address: "10.0.0.1" and "::1" are, "shop.example" is none."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def shorten(url: str) -> str:
    """How messages call an address: without query, user and password, at most 100 characters, on one line.

    Example: "https://me:pw@shop.example/a.jpg?token=abc#x" -> "https://shop.example/a.jpg?..."
    """
    place, mark, _ = re.sub(r"#.*", "", url.strip(), flags=re.DOTALL).partition("?")
    place = re.sub(r"//[^/]*@", "//", place)
    place = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in place)
    place = place if len(place) <= 100 else place[:97] + "..."
    return place + ("?..." if mark else "")


def _is_link_local(address: str) -> bool:
    """Whether an IP address, or the IPv4 address that it stands for, is one of a single cable."""
    parsed = ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_link_local


def _host(raw: str) -> str:
    """A host in its one spelling: "Shop.Example." -> "shop.example", "0:0:0:0:0:0:0:1" -> "::1"."""
    if ":" in raw:
        address = IPv6Address(raw)
        if address.scope_id is not None:
            raise AddressError("names a network interface (%) in its host")
        return str(address)
    host = raw.lower().removesuffix(".")
    labels = host.split(".")
    if not host or len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise AddressError("has no valid host" if host else "has no host")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(host))
        except ValueError as error:
            raise AddressError("has a number for a host that is not written as four decimal numbers") from error
    return host


def _words(error: BaseException) -> str:
    """An exception as part of a line, without quotations of the address, which may hold secrets."""
    return re.split(r": |'", str(error))[0][:80] or type(error).__name__
