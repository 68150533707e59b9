"""What the HTTP side of a server is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gap_export.serving.http.auth import Keys
from gap_export.serving.images import ImageBounds
from gap_export.serving.remote_images import RemoteImages

PAGE = Path(__file__).parent.parent / "page"
"""Files of the page to try a server with."""


@dataclass(frozen=True)
class HttpSettings:
    """Of one server.

    Attributes:
        keys: that clients show; None where none is asked for.
        protect_metrics: whether metrics ask for a key too.
        deadline: seconds that a request may take from its admission to its last token.
        images: bounds of images.
        remote: fetches images of allowed hosts; None where none is.
        body_bytes: most bytes of a body.
        body_seconds: within which a body must have come.
        bodies_bytes: most bytes of the bodies of all requests that are open; one address may hold a quarter of them.
        header_bytes: most bytes of the header lines of a request.
        header_seconds: within which they must have come, from the first byte on; of the first request, from the beginning of its connection.
        write_seconds: that a client may take no bytes of its answer.
        characters: most characters of the texts of a request.
        connections: most connections of all clients.
        connections_per_address: most connections of one address; 0 for no limit, of what it sends neither, where all clients come through one proxy.
        allow_baselines: whether requests may choose position ids that are wrong on purpose, to compare.
        page: folder of the page; no page where there is none.
    """

    keys: Keys | None = None
    protect_metrics: bool = False
    deadline: float = 60.0
    images: ImageBounds = field(default_factory=ImageBounds)
    remote: RemoteImages | None = None
    body_bytes: int = 20 * 2**20
    body_seconds: float = 30.0
    bodies_bytes: int = 512 * 2**20
    header_bytes: int = 16 * 2**10
    header_seconds: float = 10.0
    write_seconds: float = 60.0
    characters: int = 100_000
    connections: int = 1024
    connections_per_address: int = 64
    allow_baselines: bool = False
    page: Path = PAGE
