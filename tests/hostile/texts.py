"""Damage to what a file holds: bytes of any file, and values of files in JSON, JSON lines and YAML."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from tests.hostile.judge import REFUSED

Damage = tuple[str, bytes, str]
"""Name, the file's bytes, and what must come of them: `REFUSED`, or empty where either is right."""

_HUGE_BYTES = 40 * 2**20

LEAVES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1.5,
    -0.5,
    1e300,
    1e-300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "[/red]",
    "../../x",
    "/absolute/x",
    "a\0b",
    "\ud800",
    "\x1b[31m",
    "x" * 5000,
    "<script>alert(1)</script>",
    "$x^2$",
    [],
    {},
    [[]],
    [1, 2, 3],
    {"a": 1},
    [None],
    ["x"] * 50,
)
"""In the place of any value."""


def bytes_damaged(content: bytes, rng: random.Random) -> Iterator[Damage]:
    """Damage that knows nothing of the format; a file cut short is refused wherever its end is needed."""
    yield "empty", b"", REFUSED
    for share in (0.1, 0.5, 0.9):
        yield f"cut at {share:.0%}", content[: int(len(content) * share)], ""
    yield "without its last byte", content[:-1], ""
    for number in range(4):
        damaged = bytearray(content)
        for _ in range(1 + len(content) // 2000):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        yield f"bits flipped, {number}", bytes(damaged), ""
    yield "null bytes alone", bytes(max(len(content), 8)), REFUSED
    yield "null byte at its end", content + b"\0", ""
    yield "null byte inside", content[: len(content) // 2] + b"\0" + content[len(content) // 2 :], ""
    yield "noise", rng.randbytes(500), REFUSED
    yield "twice", content + content, ""
    yield "a page of HTML", b"<!DOCTYPE html><html><body>401</body></html>", REFUSED
    yield (
        "a pointer of Git LFS",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        REFUSED,
    )
    yield "packed with gzip", gzip.compress(content), REFUSED
    yield "packed with zip", _zipped(content), REFUSED
    yield "one endless line", b"x" * _HUGE_BYTES, REFUSED
    yield "line ends alone", b"\n" * 2**20, REFUSED


def _zipped(content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("x", content)
    return packed.getvalue()


def text_damaged(content: bytes) -> Iterator[Damage]:
    """Damage to what is UTF-8 text."""
    text = content.decode()
    middle = len(content) // 2
    yield "byte order mark", b"\xef\xbb\xbf" + content, ""
    yield "UTF-16", text.encode("utf-16"), REFUSED
    yield "UTF-32", text.encode("utf-32"), REFUSED
    yield "a byte of Latin-1", content[:middle] + b"\xe9" + content[middle:], REFUSED
    yield "an overlong slash", content[:middle] + b"\xc0\xaf" + content[middle:], REFUSED
    yield "half a character", content + b"\xe2\x82", REFUSED
    yield "line ends of Windows", text.replace("\n", "\r\n").encode(), ""
    yield "control characters", content[:middle] + b"\x1b[31m\x07" + content[middle:], ""


def json_damaged(
    content: bytes, rng: random.Random, amount: int, dump: Callable[[Any], str] = json.dumps
) -> Iterator[Damage]:
    """Damage to a JSON value, or to YAML with its `dump`.

    Args:
        content: the file.
        rng: chooses.
        amount: of values that are replaced, and of keys that are removed.
        dump: writes values.
    """
    value = yaml.safe_load(content) if dump is yaml.safe_dump else json.loads(content)
    for other in (None, [], {}, 1, "x", [value], {"x": value}):
        yield f"whole is {shown(other)}", dump(other).encode(), "" if other == [value] else REFUSED
    places = list(_places(value))
    for _ in range(amount):
        place, leaf = rng.choice(places), rng.choice(LEAVES)
        yield f"{_path(place)} is {shown(leaf)}", _dumped(dump, _with(value, place, leaf)), ""
    keys = [place for place in places if isinstance(place[-1], str)]
    for place in _sampled(rng, keys, amount // 4):
        yield f"without {_path(place)}", _dumped(dump, _without(value, place)), ""
    for place in _sampled(rng, keys, 4):
        other = _with(value, (*place[:-1], rng.choice(("unknown", "[/red]", "__class__"))), 1)
        yield f"a key more beside {_path(place)}", _dumped(dump, other), ""


def raw_json_damaged(content: bytes) -> Iterator[Damage]:
    """What JSON can be written as, and what it cannot."""
    text = content.decode().strip()
    opened, rest = text[0], text[1:]
    nested = "[" * 100_000 + "]" * 100_000
    for name, value in (
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("a number of 5,000 digits", "9" * 5000),
        ("1e999", "1e999"),
        ("lists 100,000 deep", nested),
        ("lists 200 deep", "[" * 200 + "]" * 200),
        ("objects 5,000 deep", '{"a":' * 5000 + "1" + "}" * 5000),
        ("a lone surrogate", '"\\ud800"'),
        ("a null character", '"\\u0000"'),
    ):
        if opened == "{":
            yield f"{name} under an unknown key", f'{{"unknown": {value}, {rest}'.encode(), ""
        else:
            yield f"{name} as its first element", f"[{value}, {rest}".encode(), ""
        yield f"nothing but {name}", value.encode(), REFUSED
    if opened == "{" and rest.strip() != "}":
        key = next(iter(json.loads(text)))
        yield "a key that stands twice", f"{{{json.dumps(key)}: [1, 2, 3], {rest}".encode(), REFUSED
    yield "a comma before its end", f"{text[:-1]},{text[-1]}".encode(), ""
    yield "a comment", f"// x\n{text}".encode(), REFUSED
    yield "single quotes", text.replace('"', "'").encode(), REFUSED
    yield "blanks of 8 MB", b" " * (8 * 2**20) + content, ""


def jsonl_damaged(content: bytes, rng: random.Random, amount: int) -> Iterator[Damage]:
    """Damage to one line of many, and to their order."""
    lines = content.splitlines()
    for name, damaged, expect in json_damaged(lines[1], rng, amount):
        yield f"line 2: {name}", b"\n".join([lines[0], damaged, *lines[2:]]) + b"\n", expect
    for name, damaged, _ in raw_json_damaged(lines[-1]):
        yield f"last line: {name}", b"\n".join([*lines[:-1], damaged]) + b"\n", ""
    yield "a line twice", b"\n".join([*lines, lines[0]]) + b"\n", ""
    yield "lines in another order", b"\n".join(reversed(lines)) + b"\n", ""
    yield "an empty line", b"\n".join([lines[0], b"", *lines[1:]]) + b"\n", ""
    yield "no last line end", b"\n".join(lines), ""
    yield "half a last line", content[: -len(lines[-1]) // 2], ""
    yield "all in one list", b"[" + b",".join(lines) + b"]", ""
    yield "20,000 lines that are no objects", b"1\n" * 20_000, REFUSED


def yaml_damaged(content: bytes) -> Iterator[Damage]:
    """What YAML can do that no recipe needs."""
    text = content.decode()
    bomb = "x0: &x0 [a,a,a,a,a,a,a,a,a]\n" + "".join(
        f"x{level}: &x{level} [{','.join([f'*x{level - 1}'] * 9)}]\n" for level in range(1, 12)
    )
    yield "aliases of aliases", (bomb + text).encode(), REFUSED
    yield "merged keys", (text + "\nbase: &b {a: 1}\nother:\n  <<: *b\n").encode(), REFUSED
    for name, added in {
        "a tag of a type": "summary: !!python/object/apply:os.getcwd []\n",
        "a name of a function": "summary: !!python/name:os.system\n",
        "a set": "summary: !!set {a, b}\n",
        "a date": "summary: 2026-02-31\n",
        "a number of 5,000 digits": f"seed: {'9' * 5000}\n",
        "base 60": "seed: 1:30:00\n",
        "a list 5,000 deep": f"summary: {'[' * 5000}{']' * 5000}\n",
        "a key that is a list": "? [a, b]\n: 1\n",
        "a key that stands twice": "keep: 0.5\nkeep: 0.25\n",
        "a tab": "\tsummary: x\n",
        "a second document": "---\nname: other\n",
        "a directive": "%YAML 9.9\n---\nname: other\n",
        "an open quote": 'summary: "x\n',
        "an unknown field": "kep: 0.5\n",
    }.items():
        yield name, (text + added).encode(), REFUSED
    yield "comments of 300 kB", (text + "# x\n" * 75_000).encode(), ""
    yield "comments of 20 MB", (text + "# x\n" * 5_000_000).encode(), REFUSED


def shown(value: Any) -> str:
    """A value, short."""
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _dumped(dump: Callable[[Any], str], value: Any) -> bytes:
    return dump(value).encode("utf-8", "surrogatepass")


def _sampled(rng: random.Random, items: list[Any], count: int) -> list[Any]:
    return rng.sample(items, min(count, len(items)))


def _places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything within; of long lists, the first three."""
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    for key, child in inner:
        yield (*before, key)
        yield from _places(child, (*before, key))


def _with(value: Any, place: tuple[Any, ...], leaf: Any) -> Any:
    changed = copy.deepcopy(value)
    within = changed
    for key in place[:-1]:
        within = within[key]
    if isinstance(within, list) and not isinstance(place[-1], int):
        return changed
    within[place[-1]] = copy.deepcopy(leaf)
    return changed


def _without(value: Any, place: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(value)
    within = changed
    for key in place[:-1]:
        within = within[key]
    del within[place[-1]]
    return changed


def _path(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place))
