"""Images from other servers: plain addresses of allowed hosts on the public network, dialled as they were checked."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from gap_export.errors import InputError
from gap_export.serving.images import ImageBounds, RequestImages
from gap_export.serving.remote_images import ImageRefused, RemoteImage, RemoteImages
from tests.serving.http.serving_http import SECONDS, noise

HOST, PUBLIC = "images.example.org", "93.184.216.34"


def png() -> bytes:
    buffer = io.BytesIO()
    noise(20, 10).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by the path, and notes what was asked."""

    asked: list[tuple[str, str, dict[str, str]]]
    redirects: ClassVar[dict[str, str]] = {
        "/1": "/2",
        "/2": f"http://{HOST}/3",
        "/3": "http://IMAGES.example.org:80/image.png",
        "/4": "/1",
        "/loop": "/loop",
        "/elsewhere": "http://other.example.org/image.png",
        "/inside": "http://127.0.0.1/image.png",
        "/odd": "ftp://images.example.org/image.png",
        "/slashes": "//other.example.org/image.png",
        "/back": "\\\\images.example.org/image.png",
        "/empty": "",
    }

    def do_GET(self) -> None:
        type(self).asked.append((self.path, self.headers["Host"], dict(self.headers)))
        path = self.path.partition("?")[0]
        if path in self.redirects:
            self.send_response(302)
            self.send_header("Location", self.redirects[path])
            self.end_headers()
        elif path == "/image.png":
            self._give(png())
        elif path == "/large":
            self._give(b"x" * 200_000)
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            self._drip(b"x" * 8192, 0)
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            self._drip(b"x", 0.02)
        elif path == "/slow-header":
            self._drip(b"x", 0.02)
        elif path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        elif path == "/packed":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
        else:
            self.send_error(404)

    def _give(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _drip(self, piece: bytes, seconds: float) -> None:
        try:
            for _ in range(2000):
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(seconds)
        except OSError:
            return

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def site() -> Iterator[int]:
    """Port of a server with images."""
    Handler.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


class Net:
    """A network in which every public address is the test's own server.

    Args:
        port: of that server.
        names: name -> its addresses.
    """

    def __init__(self, port: int, **names: Sequence[str]) -> None:
        self.port, self.names = port, names
        self.resolved: list[str] = []
        self.dialled: list[tuple[str, int]] = []

    def resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append(host)
        return self.names.get(host.split(".")[0], [PUBLIC])

    def dial(self, address: str, port: int, seconds: float) -> socket.socket:
        self.dialled.append((address, port))
        return socket.create_connection(("127.0.0.1", self.port), seconds)

    def images(self, *domains: str, seconds: float = 5.0, encoded_bytes: int = 100_000) -> RequestImages:
        remote = RemoteImages(domains or (HOST,), seconds=seconds, resolve=self.resolve, dial=self.dial)
        return RequestImages(ImageBounds(encoded_bytes=encoded_bytes), remote)


def waited_for() -> float:
    """Seconds."""
    return SECONDS


def fetched(images: RequestImages, url: str, left: Callable[[], float] = waited_for) -> bytes:
    """The content of an image at an address."""
    content = images.content(url, "image")
    assert isinstance(content, RemoteImage)
    return content.fetch(left)


def test_an_image_is_fetched_from_the_address_that_was_checked(
    site: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    net = Net(site)
    content = net.images().content(f"http://{HOST}/image.png?size=2", "image")
    assert (net.resolved, net.dialled) == ([], [])  # nothing is looked up before a request is admitted
    assert isinstance(content, RemoteImage)
    file = content.fetch(waited_for)
    images = net.images().open([lambda: file], ["image"])
    assert [image.size for image in images] == [(20, 10)]
    assert net.resolved == [HOST]
    assert net.dialled == [(PUBLIC, 80)]
    ((path, host, headers),) = Handler.asked
    assert (path, host) == ("/image.png?size=2", HOST)
    assert "Authorization" not in headers


def test_redirects_are_followed_where_they_stay(site: int) -> None:
    net = Net(site)
    assert fetched(net.images(), f"http://{HOST}/1") == png()
    assert net.resolved == [HOST] * 4  # each is looked up and checked again


@pytest.mark.parametrize(
    ("path", "status", "named"),
    [
        ("/4", 422, "redirected more than 3 times"),
        ("/loop", 422, "redirected more than 3 times"),
        ("/elsewhere", 400, "a host that this server does not fetch from"),
        ("/inside", 400, "a host that this server does not fetch from"),
        ("/odd", 400, "no plain address"),
        ("/slashes", 400, "no plain address"),
        ("/back", 400, "no plain address"),
        ("/empty", 400, "no plain address"),
        ("/large", 413, "more than 100000 bytes"),
        ("/endless", 413, "more than 100000 bytes"),
        ("/slow", 422, "not there within 0.5 s"),
        ("/slow-header", 422, "not there within 0.5 s"),
        ("/cut", 422, "cannot be fetched"),
        ("/packed", 422, "compressed"),
        ("/none", 422, "answered with status 404"),
    ],
)
def test_what_a_server_may_answer_is_bounded(path: str, status: int, named: str, site: int) -> None:
    seconds = 0.5 if "slow" in path else 20.0
    images = Net(site).images(seconds=seconds)
    began = time.monotonic()
    with pytest.raises(ImageRefused, match=named) as refused:
        fetched(images, f"http://{HOST}{path}")
    assert refused.value.status == status
    assert time.monotonic() - began < seconds + 5


def test_nothing_is_asked_for_when_nobody_waits(site: int) -> None:
    net = Net(site)
    with pytest.raises(ImageRefused, match="not there"):
        fetched(net.images(), f"http://{HOST}/image.png", lambda: 0.0)
    assert (net.resolved, net.dialled) == ([], [])
    waits = iter([SECONDS, SECONDS, SECONDS, 0.0, 0.0])  # at the beginning, and before each address
    with pytest.raises(ImageRefused, match="not there"):
        fetched(net.images(), f"http://{HOST}/1", lambda: next(waits))
    assert [path for path, _, _ in Handler.asked] == ["/1", "/2"]


def test_an_image_takes_no_longer_than_it_is_waited_for(site: int) -> None:
    with pytest.raises(ImageRefused, match=r"not there within 0\.2 s"):
        fetched(Net(site).images(seconds=1000.0), f"http://{HOST}/slow", lambda: 0.2)


@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}\\@127.0.0.1/a", f"http://user@{HOST}/", f"http://user:word@{HOST}/", f"http://{HOST}:8080/",
        f"http://{HOST}:0/", f"http://{HOST}:99999/", f"http://{HOST}:/", f"http://{HOST}./", f"http://.{HOST}/",
        f"http://a.{HOST}/", f"http://{HOST}.evil.org/", "http:///a", f"http:{HOST}/", f"http:/{HOST}/", "http://0x7f.1/",
        "http://2130706433/", "http://127.1/", "http://[::ffff:127.0.0.1]/", "http://[::1]/", "http://localhost/",
        f"http://{HOST}/a b", f"http://{HOST}/\ta", f"http://{HOST}/\r\nHost: b", f"http://{HOST}/é", f"http://{HOST}%2eevil.org/",
        f"http://{HOST}#@evil.org/".replace("#", "\\#"), "http://images\u017f.example.org/", f"http://{HOST}/{'a' * 2100}",
        f"HTTP://{HOST}@evil.org", "http://169.254.169.254/latest",
    ],
)  # fmt: skip
def test_no_other_address_is_taken(url: str) -> None:
    net = Net(1)
    with pytest.raises(ImageRefused) as refused:
        fetched(net.images(), url)
    assert refused.value.status == 400
    assert (net.resolved, net.dialled) == ([], [])


def test_ports_and_names_are_taken_as_they_were_allowed(site: int) -> None:
    net = Net(site)
    images = net.images("Images.Example.org", f"{HOST}:8443", "a.b")
    for url in (
        "HTTP://IMAGES.example.ORG/image.png",
        f"http://{HOST}:80/image.png",
        f"http://{HOST}:8443/image.png",
        "http://a.b/image.png",
    ):
        assert fetched(images, url) == png()
    assert net.dialled[2] == (PUBLIC, 8443)
    assert Handler.asked[2][1] == f"{HOST}:8443"
    for name in ("", "a b", "http://a.org", "a.org/", "*.a.org", "a.org:", "a.org:0", "a.org:99999", "é.org"):
        with pytest.raises(InputError, match="is not the name of a host"):
            RemoteImages([name])


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"], ["10.1.2.3"], ["172.16.0.1"], ["192.168.1.1"], ["169.254.169.254"], ["100.64.0.1"], ["0.0.0.0"],
        ["224.0.0.1"], ["255.255.255.255"], ["::1"], ["fe80::1"], ["fc00::1"], ["::ffff:127.0.0.1"], ["::ffff:10.0.0.1"],
        ["64:ff9b::7f00:1"], ["2002:7f00:1::"], ["::"], [PUBLIC, "127.0.0.1"], ["2606:2800:220:1::1", "fd00::1"], ["no address"],
        ["64:ff9b:1::7f00:1"], ["64:ff9b:1::5db8:d822"], ["fec0::1"], ["::7f00:1"], ["::5db8:d822"], ["::ffff:0:7f00:1"],
        ["192.0.0.8"], ["192.0.0.9"], ["192.88.99.1"], ["::ffff:192.88.99.1"], ["2001:0:4136:e378:8000:63bf:3fff:fdd2"],
        ["2001:db8::1"], ["3fff::1"], ["2606:2800:220:1::5efe:a00:1"], ["2606:2800:220:1:200:5efe:a00:1"], ["4000::1"], ["ff0e::1"],
    ],
    ids=str,
)  # fmt: skip
def test_hosts_that_are_not_on_the_public_network_are_refused(addresses: list[str]) -> None:
    net = Net(1, images=addresses)
    with pytest.raises(ImageRefused, match="not on the public network"):
        fetched(net.images(), f"http://{HOST}/image.png")
    assert net.dialled == []


def test_public_addresses_are_dialled_one_after_the_other(site: int) -> None:
    net = Net(site, images=["2606:2800:220:1::1", "::ffff:93.184.216.34"])
    dial = net.dial

    def first_fails(address: str, port: int, seconds: float) -> socket.socket:
        made = dial(address, port, seconds)
        if len(net.dialled) == 1:
            made.close()
            raise OSError
        return made

    remote = RemoteImages([HOST], resolve=net.resolve, dial=first_fails)
    assert fetched(RequestImages(ImageBounds(), remote), f"http://{HOST}/image.png") == png()
    assert [address for address, _ in net.dialled] == ["2606:2800:220:1::1", "::ffff:93.184.216.34"]
    for names, named in (([], "without an address"),):
        with pytest.raises(ImageRefused, match=named):
            fetched(Net(site, images=names).images(), f"http://{HOST}/image.png")


def test_https_names_the_host_and_wants_its_certificate() -> None:
    heard: list[bytes] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def hear() -> None:
        connection, _ = listening.accept()
        with connection:
            heard.append(connection.recv(4096))

    thread = threading.Thread(target=hear, daemon=True)
    thread.start()
    net = Net(listening.getsockname()[1])
    with pytest.raises(ImageRefused, match="cannot be fetched") as refused:
        fetched(net.images(), f"https://{HOST}/image.png")
    thread.join(5)
    listening.close()
    assert net.dialled == [(PUBLIC, 443)]
    assert HOST.encode() in heard[0]
    assert "SSL" not in str(refused.value)
