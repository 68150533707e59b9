"""The body of a request as JSON: read within bounds, and parsed as the standard has it, in bounded time and memory."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from starlette.requests import Request

from gap_export.serving.http.errors import HttpError

DEEPEST = 32
"""Lists and objects within each other."""
MOST_VALUES = 100_000
"""Brackets, commas and colons of a body, those in texts included: a value of two bytes takes a hundred in memory."""
LONGEST_NUMBER = 400
"""Characters; more would take long to convert."""
_LARGE_BYTES = 2**18
"""What is larger is parsed on another thread."""
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


async def json_body(request: Request) -> dict[str, Any]:
    """The object that a request brings.

    Args:
        request: its body was not read yet; limits of it are the middleware's.

    Raises:
        HttpError: another content type, a coding, or no such JSON.
    """
    _check_headers(request)
    body = bytearray()  # not `request.body()`, which would hold it until the answer is given
    async for piece in request.stream():
        body += piece
    if len(body) < _LARGE_BYTES:
        return parse_object(body)
    return await asyncio.get_running_loop().run_in_executor(None, parse_object, body)


def parse_object(body: bytes | bytearray) -> dict[str, Any]:
    """Parse a JSON object: no NaN, no infinity, no key twice, no half of a surrogate pair, nothing behind it.

    Args:
        body: of a request.

    Raises:
        HttpError: 400.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise _no_json("is not UTF-8") from None
    if sum(map(text.count, "[{,:")) > MOST_VALUES:
        raise _no_json(f"has more than {MOST_VALUES} values")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_whole, parse_float=_finite, parse_constant=_constant
        )
    except json.JSONDecodeError as error:
        raise _no_json(f"is not JSON: see line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise _no_json("is not a JSON object")
    _check_depth(value)
    if "\\" in text and _HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise _no_json("has text with half of a surrogate pair") from None
    return value


def _check_headers(request: Request) -> None:
    kind, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    if kind.strip() != "application/json":
        raise HttpError(415, "the body must be JSON: send Content-Type: application/json")
    charset = parameters.replace('"', "").replace(" ", "")
    if charset not in ("", "charset=utf-8", "charset=utf8"):
        raise HttpError(415, "the body must be JSON in UTF-8: send Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HttpError(415, "the body must not be compressed: send it without Content-Encoding")


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [
            child
            for each in level
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _no_json(f"has the key {key[:80]!r} twice in one object")
            seen.add(key)
    return made


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise _no_json("has a number of too many digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits) if len(digits) <= LONGEST_NUMBER else float("inf")
    if value in (float("inf"), float("-inf")):
        raise _no_json("has a number that is too large or too long")
    return value


def _constant(name: str) -> float:
    raise _no_json(f"has {name}, which is no number in JSON")


def _no_json(message: str) -> HttpError:
    return HttpError(400, f"the body {message}", code="invalid_json")


def _too_deep() -> HttpError:
    return _no_json(f"has lists and objects more than {DEEPEST} deep within each other")
