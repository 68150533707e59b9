"""The page to try a server with: files of one folder, read once, served by their names."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

INDEX = "index.html"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing is loaded from elsewhere, and no other page frames it."""
_HIDDEN = (".", "_")
_SOURCES = (".py", ".pyc", ".md")


def page_routes(folder: Path) -> list[Route]:
    """A route for every file of the page; none where there is no page.

    Args:
        folder: of it, without folders in it.
    """
    if not (folder / INDEX).is_file():
        return []
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in _SOURCES and not path.name.startswith(_HIDDEN)
    ]
    routes = [_route(f"/{path.name}", path) for path in files]
    return [_route("/", folder / INDEX), *routes]


def _route(address: str, path: Path) -> Route:
    content = path.read_bytes()
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    text = kind.startswith("text/") or kind in ("application/javascript", "application/json", "image/svg+xml")

    async def give(request: Request) -> Response:
        return Response(
            content, headers={**_HEADERS, "Content-Type": f"{kind}; charset=utf-8" if text else kind}
        )

    return Route(address, give, methods=["GET"], include_in_schema=False)
