"""The body of a request as JSON: read within bounds, and parsed as the standard has it, in bounded time and memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from gap_export.files.read import is_deeper
from gap_export.serving.http.errors import HttpError

DEEPEST = 32
"""Lists and objects within each other."""
MOST_VALUES = 100_000
"""Brackets, commas and colons of a body, those in texts included: a value of two bytes takes a hundred in memory."""
MOST_KEYS = 100
"""Of one object: each that is no field is a fault of its own to whoever checks them."""
LONGEST_NUMBER = 400
"""Characters; more would take long to convert."""
_LARGE_BYTES = 2**16
"""What is larger is parsed and checked on another thread."""

Checked = TypeVar("Checked")


async def json_body(request: Request, check: Callable[[dict[str, Any]], Checked]) -> Checked:
    """The object that a request brings, checked.

    Args:
        request: its body was not read yet; limits of it are the middleware's.
        check: makes of the object what is wanted, on whatever thread.

    Raises:
        HttpError: another content type, a coding, no such JSON, or what the check raises.
    """
    _check_headers(request)
    body = bytearray()  # not `request.body()`, which would hold it until the answer is given
    async for piece in request.stream():
        body += piece
    if len(body) < _LARGE_BYTES:
        return check(parse_object(body))
    return await asyncio.get_running_loop().run_in_executor(None, lambda: check(parse_object(body)))


def parse_object(body: bytes | bytearray) -> dict[str, Any]:
    """Parse a JSON object: no NaN, no infinity, no key twice, no half of a surrogate pair, nothing behind it, and no more of anything than may be.

    Args:
        body: of a request.

    Raises:
        HttpError: 400.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise _no_json("is not UTF-8") from None
    if len(body) - len(body.translate(None, b"[{,:")) > MOST_VALUES:  # (sooner than to count each of them)
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
    if is_deeper(value, DEEPEST):
        raise _too_deep()
    # Other text was UTF-8, and has no surrogates. One character is found much sooner than two.
    if "\\" in text and "\\u" in text:
        _check_texts(value)
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


def _check_texts(value: Any) -> None:
    if isinstance(value, str):
        if not value.isascii():  # known of every text: the address of a large image is not read again
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise _no_json("has text with half of a surrogate pair") from None
    elif isinstance(value, dict):
        for key, child in value.items():
            _check_texts(key)
            _check_texts(child)
    elif isinstance(value, list):
        for child in value:
            _check_texts(child)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_KEYS:
        raise _no_json(f"has an object with more than {MOST_KEYS} keys")
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
