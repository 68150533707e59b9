"""Manifests with one thing wrong: every value of a real one replaced, every key and item removed, repeated or moved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

POOL: tuple[Any, ...] = (
    0,
    1,
    -1,
    3,
    2**31,
    10**12,
    -(10**30),
    0.5,
    -0.0,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "..",
    "../x",
    "/abs",
    "C:\\x",
    "a/../b",
    "a\nb\x00",
    "[/red]",
    "1",
    "x" * 5000,
    True,
    False,
    None,
    [],
    {},
    [None],
    {"a": 1},
)
"""What stands in the place of a value."""


@dataclass(frozen=True)
class Mutation:
    """A manifest with one thing wrong.

    Attributes:
        path: of what was changed, keys and numbers.
        kind: what was done.
        content: the manifest.
    """

    path: tuple[str | int, ...]
    kind: str
    content: Any

    @property
    def field(self) -> str:
        """The path, as messages have it."""
        return ".".join(map(str, self.path))


def mutations(manifest: Any) -> Iterator[Mutation]:
    """All of them, in the order of the manifest."""
    for path, value in _places(manifest):
        for member in POOL:
            if not _same(member, value):
                yield _with(manifest, path, f"is {_short(member)}", member)
        if isinstance(value, dict):
            for key in value:
                yield _with(manifest, path, f"without {key}", {k: v for k, v in value.items() if k != key})
            yield _with(manifest, path, "with more", {**value, "more": 1})
        if isinstance(value, list) and value:
            yield _with(manifest, path, "first item twice", [value[0], *value])
            yield _with(manifest, path, "without its last item", value[:-1])
            if value[::-1] != value:
                yield _with(manifest, path, "reversed", value[::-1])
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield _with(manifest, path, "one more", value + 1)
            if value:
                yield _with(manifest, path, "doubled", value * 2)


def _same(one: Any, other: Any) -> bool:
    """Whether two values say the same: a 1 where 1.0 is meant is no fault, nor is "1" where a recipe may have text."""
    if isinstance(one, int) and isinstance(other, float) and not isinstance(one, bool):
        return one == other
    if isinstance(one, str) and isinstance(other, float):
        return one == f"{other:g}"
    return type(one) is type(other) and repr(one) == repr(other)


def _places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if path:
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _places(child, (*path, key))


def _with(manifest: Any, path: tuple[str | int, ...], kind: str, value: Any) -> Mutation:
    """Only what lies on the way is copied."""
    content = copy.copy(manifest)
    place = content
    for key in path[:-1]:
        place[key] = copy.copy(place[key])
        place = place[key]
    place[path[-1]] = value
    return Mutation(path, kind, content)


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 40 else f"{repr(value)[:20]}..."
