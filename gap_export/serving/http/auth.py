"""Keys: who may ask. They stand in a file, one a line, and are compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from gap_export.errors import InputError
from gap_export.files import is_file, kinds
from gap_export.files.read import read_text
from gap_export.serving.http.errors import HttpError

_KEY = re.compile(r"[!-~]{8,512}")
_FREE = ("/v1/health/live", "/v1/health/ready")
METRICS = "/metrics"


class Keys:
    """Keys that clients may show; their digests alone are held.

    Args:
        keys: at least one, 8 characters or more of printable ASCII.

    Raises:
        InputError: there is none, or one is none; it is not repeated.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise InputError("has no key", subject="--api-keys", hint="write one key a line")
        for number, key in enumerate(keys, 1):
            if not _KEY.fullmatch(key):
                raise InputError(
                    "is not 8 to 512 characters of printable ASCII without blanks",
                    subject=f"key {number}",
                    hint="make one with: openssl rand -hex 32",
                )
        self._digests = tuple(_digest(key.encode()) for key in keys)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read a file of keys: one a line; empty lines and those that begin with # are left out.

        Args:
            path: of it.

        Raises:
            InputError: it cannot be read, or has no key.
        """
        lines = (line.strip() for line in read_text(path, kinds.KEYS).splitlines())
        return cls([line for line in lines if line and not line.startswith("#")])

    def hold(self, key: bytes) -> bool:
        """Whether it is one of them; the time does not depend on which, nor on how much of it is right."""
        digest, found = _digest(key), False
        for each in self._digests:
            found |= hmac.compare_digest(digest, each)
        return found


def others_can_read(path: Path) -> bool:
    """Whether a file may be read by other users than its owner."""
    return is_file(path) and bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))


class Authentication:
    """Middleware: requests without a key go no further. Health is free, and the page, whose own requests bring one.

    Args:
        app: behind it.
        keys: that are accepted; None lets all requests pass.
        protect_metrics: whether metrics ask for one.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, protect_metrics: bool) -> None:
        self._app, self._keys, self._protect_metrics = app, keys, protect_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] != "http" or self._keys is None or not self._is_protected(scope["path"]):
            await self._app(scope, receive, send)
            return
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = shown[0].partition(b" ") if len(shown) == 1 else (b"", b"", b"")
        if self._keys.hold(key.strip()) and scheme.lower() == b"bearer":
            await self._app(scope, receive, send)
            return
        error = HttpError(
            401,
            "a key is needed: send Authorization: Bearer KEY" if not shown else "this key is not accepted",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _is_protected(self, path: str) -> bool:
        if path == METRICS:
            return self._protect_metrics
        return path.startswith("/v1/") and path not in _FREE


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
