"""Images from other servers, of allowed domains alone.

An address is parsed once, by one parser, from text that no two parsers read differently. The name is resolved once, every address that it has must
be a public one, and the connection is made to that very address. A redirect is a new address, and is checked like the first.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from gap_export.errors import InputError

LONGEST_URL = 2048
MOST_REDIRECTS = 3
_PORTS = {"https": 443, "http": 80}
_PLAIN = re.compile(r"[!-\[\]-~]+")  # printable ASCII without blanks and backslashes
_PLACE = re.compile(r"([a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?::([0-9]{1,5}))?", re.IGNORECASE | re.ASCII)
_PIECE_BYTES = 2**16
_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All IPv6 addresses that hosts of the public network have; outside lie those of one's own network, and others that stand for an IPv4 address."""
_NO_HOSTS = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20"))
)
"""Of protocols and tunnels, and for documents; `ipaddress` calls some of them global."""
_ISATAP = 0x5EFE
"""In the middle of an IPv6 address: an IPv4 address of any kind follows."""

SecondsLeft = Callable[[], float]
"""Tells how long whoever asked still waits; 0 or less from when they no longer do."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]
"""(name, port) -> every address that the name has."""
Dial = Callable[[str, int, float], socket.socket]
"""(address, port, seconds) -> a connection to it."""


class ImageRefused(InputError):
    """An image that a request cannot have.

    Args:
        message: why, in words of this package.
        subject: the field that it stands in.
        hint: what to send.
        status: of the answer over HTTP.
    """

    def __init__(
        self, message: str, *, subject: str, hint: str, status: Literal[400, 413, 422] = 400
    ) -> None:
        super().__init__(message, subject=subject, hint=hint)
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        """Made again from its own arguments."""
        return _refused, (self.message, self.subject, self.hint, self.status)


def _refused(message: str, subject: str, hint: str, status: Literal[400, 413, 422]) -> ImageRefused:
    return ImageRefused(message, subject=subject, hint=hint, status=status)


@dataclass(frozen=True)
class Target:
    """A checked address.

    Attributes:
        scheme: `https` or `http`.
        host: name, in lower case.
        port: of it.
        path: with the query, as it is asked for.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def place(self) -> str:
        """Host, with the port where it is not the scheme's own."""
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"


def resolved(host: str, port: int) -> Sequence[str]:
    """Every address of a name, as the system resolves it."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in found))


def dialled(address: str, port: int, seconds: float) -> socket.socket:
    """A connection to an address; no name is looked up, and no proxy is asked."""
    return socket.create_connection((address, port), seconds)


class RemoteImages:
    """Fetches images of allowed domains.

    Args:
        domains: names, each the whole name of a host, with `:port` where it is not the scheme's own.
        seconds: that one image may take, redirects included.
        resolve: looks names up.
        dial: connects.

    Raises:
        InputError: a domain that is none.
    """

    def __init__(
        self,
        domains: Sequence[str],
        *,
        seconds: float = 10.0,
        resolve: Resolve = resolved,
        dial: Dial = dialled,
    ) -> None:
        self._domains = {_domain(name) for name in domains}
        self._seconds, self._resolve, self._dial = seconds, resolve, dial

    def check(self, url: str, subject: str) -> Target:
        """Refuse an address that is not plain, or not of an allowed domain; nothing is looked up.

        Args:
            url: as given.
            subject: for messages.

        Raises:
            ImageRefused: it is refused.
        """
        target = _target(url)
        if target is None:
            raise ImageRefused(
                "is no plain address of an image",
                subject=subject,
                hint="write https://host/path, without user, backslash or blanks",
            )
        if not self._domains & {target.place, f"{target.host}:{target.port}"}:
            raise ImageRefused(
                "is the address of a host that this server does not fetch from",
                subject=subject,
                hint="send the image itself: data:image/png;base64,...",
            )
        return target

    def fetch(self, target: Target, most_bytes: int, subject: str, left: SecondsLeft) -> bytes:
        """The content of an image.

        Args:
            target: checked.
            most_bytes: that it may have.
            subject: for messages.
            left: how long it is waited for; nothing more is asked for when it is not.

        Raises:
            ImageRefused: it cannot be had, is too large, takes too long, or leads elsewhere.
        """
        seconds = min(self._seconds, max(0.0, left()))
        ends = time.monotonic() + seconds
        try:
            for _ in range(MOST_REDIRECTS + 1):
                if left() <= 0:
                    raise TimeoutError
                addresses = self._public(target, subject, ends)
                found = self._get(target, addresses, most_bytes, subject, ends)
                if isinstance(found, bytes):
                    return found
                after = self.check(found, subject)
                if target.scheme == "https" and after.scheme == "http":
                    raise _not_fetched("leads from https to http", subject)
                target = after
        except (OSError, http.client.HTTPException, ValueError):
            late = time.monotonic() >= ends or left() <= 0
            raise _not_fetched(
                f"was not there within {seconds:.3g} s" if late else "cannot be fetched", subject
            ) from None
        raise _not_fetched(f"is redirected more than {MOST_REDIRECTS} times", subject)

    def _public(self, target: Target, subject: str, ends: float) -> Sequence[str]:
        """Every address of a host, all of them public."""
        found: list[Sequence[str]] = []

        def look_up() -> None:
            try:
                found.append(self._resolve(target.host, target.port))
            except (OSError, UnicodeError):
                found.append(())

        # The system's own lookup has no time limit.
        thread = threading.Thread(target=look_up, name="gap-lookup", daemon=True)
        thread.start()
        thread.join(max(0.0, ends - time.monotonic()))
        addresses = found[0] if found else ()
        if not addresses:
            raise _not_fetched("is of a host without an address", subject)
        if not all(_is_public(address) for address in addresses):
            raise ImageRefused(
                "is of a host that is not on the public network",
                subject=subject,
                hint="send the image itself: data:image/png;base64,...",
            )
        return addresses

    def _get(
        self, target: Target, addresses: Sequence[str], most_bytes: int, subject: str, ends: float
    ) -> bytes | str:
        """Content, or where it is instead."""
        line = _Line(self._connected(target, addresses, ends))
        # A socket's own timeout begins anew with every byte; this one does not.
        timer = threading.Timer(max(0.0, ends - time.monotonic()), line.cut)
        timer.daemon = True
        timer.start()
        try:
            if target.scheme == "https":
                line.secure(target.host)
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.auto_open = 0  # never to another address
            connection.sock = line.socket
            connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
            for name, value in (
                ("Host", target.place),
                ("Accept", "image/*"),
                ("Accept-Encoding", "identity"),
                ("Connection", "close"),
                ("User-Agent", "gap-export"),
            ):
                connection.putheader(name, value)
            connection.endheaders()
            with connection.getresponse() as response:
                if response.status in (301, 302, 303, 307, 308):
                    return _absolute(target, response.getheader("Location") or "")
                if response.status != 200:
                    raise _not_fetched(f"is answered with status {response.status}", subject)
                if response.getheader("Content-Encoding", "identity").lower() != "identity":
                    raise _not_fetched("is sent compressed, which was not asked for", subject)
                return _read(response, most_bytes, subject)
        finally:
            timer.cancel()
            line.close()
            if time.monotonic() >= ends:
                raise TimeoutError

    def _connected(self, target: Target, addresses: Sequence[str], ends: float) -> socket.socket:
        failure: OSError = OSError()
        for address in addresses:
            left = ends - time.monotonic()
            if left <= 0:
                raise TimeoutError
            try:
                made = self._dial(address, target.port, left)
            except OSError as error:
                failure = error
                continue
            made.settimeout(max(0.05, ends - time.monotonic()))
            return made
        raise failure


@dataclass(frozen=True)
class RemoteImage:
    """An image at a checked address.

    Attributes:
        remote: fetches it.
        target: its address.
        most_bytes: that it may have.
        subject: the field that it stands in, for messages.
    """

    remote: RemoteImages
    target: Target
    most_bytes: int
    subject: str

    def fetch(self, left: SecondsLeft) -> bytes:
        """Its content.

        Args:
            left: how long it is waited for.

        Raises:
            ImageRefused: it cannot be had.
        """
        return self.remote.fetch(self.target, self.most_bytes, self.subject, left)


class _Line:
    """A connection that can be cut from another thread."""

    def __init__(self, plain: socket.socket) -> None:
        self.socket = plain

    def secure(self, host: str) -> None:
        """TLS, for the name that was asked for."""
        context = ssl.create_default_context()
        secured = context.wrap_socket(self.socket, server_hostname=host, do_handshake_on_connect=False)
        self.socket = secured
        secured.do_handshake()

    def cut(self) -> None:
        """Have whoever reads or writes stop."""
        try:
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Give the connection back."""
        self.socket.close()


def _read(response: http.client.HTTPResponse, most_bytes: int, subject: str) -> bytes:
    pieces: list[bytes] = []
    total = 0
    while piece := response.read(min(_PIECE_BYTES, most_bytes + 1 - total)):
        pieces.append(piece)
        total += len(piece)
        if total > most_bytes:
            raise ImageRefused(
                f"has more than {most_bytes} bytes",
                subject=subject,
                hint="scale it down, the model sees a few hundred pixels a side",
                status=413,
            )
    if response.length:
        raise OSError
    return b"".join(pieces)


def _target(url: str) -> Target | None:
    """The parts of an address; None where it is not plain."""
    if len(url) > LONGEST_URL or not _PLAIN.fullmatch(url):
        return None
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    place = _PLACE.fullmatch(parts.netloc)
    scheme = parts.scheme.lower()
    if place is None or scheme not in _PORTS:
        return None
    port = int(place[2]) if place[2] else _PORTS[scheme]
    if not 0 < port < 2**16:
        return None
    path = parts.path or "/"
    return Target(scheme, place[1].lower(), port, f"{path}?{parts.query}" if parts.query else path)


def _absolute(target: Target, location: str) -> str:
    """Where a redirect leads; a path alone stays on its host."""
    if location.startswith("/") and not location.startswith("//"):
        return f"{target.scheme}://{target.place}{location}"
    return location


def _domain(name: str) -> str:
    place = _PLACE.fullmatch(name)
    if place is None or (place[2] and not 0 < int(place[2]) < 2**16):
        raise InputError(
            "is not the name of a host",
            subject=f"--allow-domain {name[:80]!r}",
            hint="write images.example.org, or images.example.org:8443",
        )
    return name.lower()


def _is_public(text: str) -> bool:
    """Whether an address is one of the public network, and stands for no other address."""
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address not in _UNICAST or (int(address) >> 32) & 0xFDFF_FFFF == _ISATAP:
            return False
    if any(address in network for network in _NO_HOSTS):
        return False
    return address.is_global and not address.is_multicast


def _not_fetched(message: str, subject: str) -> ImageRefused:
    return ImageRefused(
        message, subject=subject, hint="send the image itself: data:image/png;base64,...", status=422
    )
