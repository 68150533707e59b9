"""The server's process: listens, becomes ready, and on SIGTERM finishes what it admitted before it ends.

listening -> checked: ready -> SIGTERM: ready no more -> grace -> nothing more is admitted -> all answered -> exit 0
                                        (SIGTERM again, at any time: what is left is given up -> exit 0)
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import uvicorn

from gap_export.errors import GapExportError, InputError, SessionError, first_line
from gap_export.serving.http.app import create_app
from gap_export.serving.http.connections import bounded_protocol
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.service import Service
from gap_export.serving.work import Refused

_KEEP_ALIVE_SECONDS = 15
_LAST_WRITES_SECONDS = 10
"""How long clients may take to read the last answers, when the server stops."""
_BACKLOG = 1024


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, and how it ends.

    Attributes:
        host: address or name; a name stands for its first address.
        port: 0 for any that is free.
        drain_grace: seconds between being ready no more and admitting nothing more, for balancers that look rarely.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain_grace: float = 0.0


def is_loopback(host: str) -> bool:
    """Whether an address or a name is of this machine alone.

    Raises:
        InputError: the name has no address.
    """
    return all(ipaddress.ip_address(address).is_loopback for _, address in _addresses(host))


def listen(options: ServerOptions) -> socket.socket:
    """A socket that connections are accepted on.

    Args:
        options: address and port.

    Raises:
        InputError: there is no such address, or the port is taken.
    """
    family, address = _addresses(options.host)[0]
    # The protocol is named because asyncio sends small answers at once only on sockets that say it; others wait 40 ms for the client.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, options.port))
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise InputError(
            f"cannot be listened on: {error.strerror or first_line(error)}",
            subject=f"{options.host}:{options.port}",
            hint="choose another --port, or 0 for any that is free",
        ) from error
    made.setblocking(False)
    return made


def address_of(listening: socket.socket) -> str:
    """What clients ask: `http://127.0.0.1:8000`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A server of one service.

    Args:
        service: that answers.
        settings: of the HTTP side.
        options: how it ends.
        on_listening: told of this server when connections are accepted.
        on_ready: called when the session was checked.

    Attributes:
        name: of the model.
        address: what clients ask, once connections are accepted: `http://127.0.0.1:8000`.
        failure: why the service never became ready; None where it did.
    """

    def __init__(
        self,
        service: Service,
        settings: HttpSettings,
        options: ServerOptions,
        *,
        on_listening: Callable[[Server], None] = lambda _: None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service, settings),
                http=bounded_protocol(settings),
                loop="asyncio",
                ws="none",
                lifespan="off",
                workers=1,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_LAST_WRITES_SECONDS,
                h11_max_incomplete_event_size=2 * settings.header_bytes,
            )
        )
        # Its messages would repeat what broken requests say.
        for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self._service, self._options = service, options
        self._on_listening, self._on_ready = on_listening, on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._stop_asked = False
        self.name, self.address = service.name, ""
        self.failure: GapExportError | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and begin to check the session."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if sockets:
            self.address = address_of(sockets[0])
        self._on_listening(self)
        threading.Thread(target=self._prove, name="gap-ready", daemon=True).start()
        if self._stop_asked:
            self._begin_to_stop()

    def stop(self) -> None:
        """Have it end as SIGTERM does; from any thread."""
        self._stop_asked = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and the server with it
                self._loop.call_soon_threadsafe(self._begin_to_stop)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what was admitted at the first signal; give it up at the second, and end after the call that is being computed."""
        if self._stop_asked:
            self.should_exit = self.force_exit = True
        self.stop()

    def _prove(self) -> None:
        try:
            self._service.prove()
        except GapExportError as error:
            is_stopped = isinstance(error, Refused) and error.reason == "draining" and self._stop_asked
            self.failure = (
                None if is_stopped else error
            )  # one that is told to stop before it is ready has not failed
            self.stop()
        except Exception as error:
            self.failure = SessionError(
                f"cannot be checked: {first_line(error)}",
                subject="the session",
                hint="this is a fault of the server; please report it",
            )
            self.stop()
        else:
            if not self._stop_asked:
                self._on_ready()

    def _begin_to_stop(self) -> None:
        self._service.stop()
        if self.force_exit:
            self._service.engine.give_up()  # or the thread that empties it would be waited for
            self.config.timeout_graceful_shutdown = 0
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            if self.failure is None:
                await asyncio.sleep(self._options.drain_grace)
            await asyncio.get_running_loop().run_in_executor(None, self._service.engine.drain)
        finally:
            self.should_exit = True


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(
            "is no address of this machine",
            subject=f"--host {host[:80]!r}",
            hint="write 127.0.0.1 or 0.0.0.0",
        ) from error
    return [(row[0], str(row[4][0]).partition("%")[0]) for row in found]
