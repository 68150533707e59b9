"""Requests that mean harm, or that nobody meant: bodies, images, conversations, numbers and header lines, each by its name."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tests.serving.http.serving_http import data_url, noise
from tests.serving.http.test_bodies import REFUSED

GROUND, INFER, CHAT = "/v1/ground", "/v1/infer", "/v1/chat/completions"
HUGE = 10**400


@dataclass(frozen=True)
class Payload:
    """One request.

    Attributes:
        name: unique.
        body: of it.
        path: of it.
        headers: in place of those that a client of JSON has.
        method: of it.
        accepted: whether an answer is right too: what is odd, and no fault.
    """

    name: str
    body: bytes
    path: str = GROUND
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    accepted: bool = False


def payloads(image: Image.Image, expression: str) -> tuple[Payload, ...]:
    """All of them.

    Args:
        image: that is harmless.
        expression: that fits it.
    """
    url = data_url(image)
    return (
        *(Payload(f"body: {name}", body) for name, (body, _) in REFUSED.items()),
        *_of_images(expression),
        *_of_fields(url, expression),
        *_of_texts(url),
        *_of_conversations(url),
        *_of_headers(_json(image=url, expression=expression)),
    )


def _json(**body: Any) -> bytes:
    return json.dumps(body).encode()


# ----------------------------------------------------------------------------------------------------------------------
# Images


def _url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(width: int, height: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever is in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (_chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b""))
    )


def _of_images(expression: str) -> Iterator[Payload]:
    small = noise(40, 30)
    png, jpeg = _file(small, "PNG"), _file(small, "JPEG")
    frames = [Image.fromarray(np.full((8, 8), shade % 256, np.uint8)) for shade in range(300)]
    files: dict[str, tuple[str, bool]] = {
        "no bytes": (_url(b""), False),
        "text": (_url(b"an image"), False),
        "first bytes of a PNG": (_url(png[:20]), False),
        "half a PNG": (_url(png[: len(png) // 2]), False),
        "half a JPEG": (_url(jpeg[: len(jpeg) // 2], "jpeg"), True),
        "a JPEG that is called PNG": (_url(jpeg), True),
        "a PNG with a wrong sum": (_url(png[:40] + bytes([png[40] ^ 255]) + png[41:]), False),
        "100,000 by 100,000": (_url(_png(100_000, 100_000)), False),
        "2^31 - 1 wide": (_url(_png(2**31 - 1, 1)), False),
        "no pixels": (_url(_png(0, 10)), False),
        "one pixel": (_url(_file(noise(1, 1), "PNG")), True),
        "a line": (_url(_file(noise(3000, 1), "PNG")), True),
        "longer than the longest side": (_url(_png(20_000, 4, rows=bytes(4 * 60_001))), False),
        "as many pixels as may be": (_url(_file(Image.new("RGB", (6300, 6300)), "PNG")), True),
        "text that grows a thousandfold": (
            _url(_png(9, 9, _chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(10**8))))), False,
        ),
        "a profile that grows a thousandfold": (
            _url(_png(9, 9, _chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(10**8))), rows=bytes(9 * 28))), True,
        ),
        "300 frames": (_url(_file(frames[0], "GIF", save_all=True, append_images=frames[1:]), "gif"), True),
        "a drawing": (_url(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "svg+xml"), False),
        "PostScript": (_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "x-eps"), False),
        "a TIFF": (_url(_file(small, "TIFF"), "tiff"), True),
        "an icon": (_url(_file(small, "ICO"), "x-icon"), True),
        "16 bits": (_url(_file(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)), "PNG")), True),
        "CMYK": (_url(_file(small.convert("CMYK"), "JPEG"), "jpeg"), True),
        "transparent": (_url(_file(small.convert("RGBA"), "PNG")), True),
        "EXIF of noise": (_url(_file(small, "JPEG", exif=b"Exif\0\0" + bytes(range(256))), "jpeg"), True),
        "base64 of another alphabet": ("data:image/png;base64,____", False),
        "base64 that is cut off": (_url(png)[:-3], False),
        "not an image": ("data:text/html;base64,PGI+", False),
        "a file": ("file:///etc/passwd", False),
        "the machine itself": ("http://127.0.0.1:1/x.png", False),
        "the machine's cloud": ("http://169.254.169.254/latest/meta-data/", False),
        "a path": ("../../../etc/passwd", False),
        "no address": ("", False),
        "a long address": ("https://a.example/" + "a" * 100_000, False),
        "a byte of zero": ("data:image/png;base64,\0", False),
    }  # fmt: skip
    for name, (url, accepted) in files.items():
        yield Payload(f"image: {name}", _json(image=url, expression=expression), accepted=accepted)
    yield Payload("images: several", _json(images=[_url(png)] * 3, expression=expression))
    yield Payload("images: a thousand", _json(images=[_url(png)] * 1000, expression=expression))
    yield Payload("images: none", _json(images=[], expression=expression))


# ----------------------------------------------------------------------------------------------------------------------
# Fields and texts


def _of_fields(url: str, expression: str) -> Iterator[Payload]:
    wrong: dict[str, dict[str, Any]] = {
        "keep of 0": {"keep": 0},
        "keep below 0": {"keep": -1},
        "keep above 1": {"keep": 1.0000001},
        "keep of nearly 0": {"keep": 1e-300},
        "keep as text": {"keep": "0.5"},
        "keep as a switch": {"keep": True},
        "keep of a list": {"keep": [0.5]},
        "no tokens": {"max_new_tokens": 0},
        "tokens below 0": {"max_new_tokens": -5},
        "2^63 tokens": {"max_new_tokens": 2**63},
        "half a token": {"max_new_tokens": 0.5},
        "more tokens than fit": {"max_new_tokens": 100_000},
        "an unknown field": {"temprature": 0},
        "a field of Python": {"__class__": "x"},
        "markup as a field": {"[/red]\u202e\u0007": 1},
        "a number as expression": {"expression": 7},
        "no expression": {"expression": None},
        "both forms": {"expressions": ["a"]},
        "another model": {"model": "gpt-4o"},
        "a long model": {"model": "x" * 100_000},
        "other positions": {"positions": "shifted"},
        "unknown positions": {"positions": "x"},
    }
    for name, fields in wrong.items():
        yield Payload(f"field: {name}", _json(**{"image": url, "expression": expression, **fields}))
    yield Payload(
        "field: 400 digits", b'{"image": "x", "expression": "a", "keep": ' + str(HUGE).encode() + b"}"
    )
    yield Payload("field: 17 expressions", _json(image=url, expressions=[expression] * 17))
    yield Payload("field: 10,000 expressions", _json(image=url, expressions=["a"] * 10_000))
    yield Payload("infer: no labels", _json(input=[{"type": "image_url", "url": url}], labels=[]), INFER)
    yield Payload("infer: no images", _json(input=[], labels=["a"]), INFER)
    yield Payload("infer: another type", _json(input=[{"type": "video", "url": url}], labels=["a"]), INFER)
    yield Payload("infer: an object", _json(input={"type": "image_url"}, labels="a"), INFER)


def _of_texts(url: str) -> Iterator[Payload]:
    texts = {
        "empty": "",
        "blank": " \n\t ",
        "a placeholder": "<image>",
        "control tokens": "</s><s>[INST]",
        "a format": "{expression} {0.__class__} %s",
        "a template": "{{ 7 * 7 }}{% for x in range(10**9) %}x{% endfor %}",
        "zeros": "a\0b",
        "turned": "\u202e\u2066mug",
        "emoji": "\U0001f9d1\u200d\U0001f680" * 30,
        "accents": "e" + "\u0301" * 5000,
        "100,001 characters": "a" * 100_001,
        "50,000 characters": "red " * 12_500,
    }
    for name, text in texts.items():
        yield Payload(f"text: {name}", _json(image=url, expression=text), accepted=True)


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


def _of_conversations(url: str) -> Iterator[Payload]:
    user = {"role": "user", "content": "where is it?"}
    shown = {"type": "image_url", "image_url": {"url": url}}
    messages: dict[str, Any] = {
        "none": [],
        "no list": {"role": "user"},
        "numbers": [1, 2],
        "another role": [{"role": "tool", "content": "x"}],
        "the assistant last": [user, {"role": "assistant", "content": "x"}],
        "the system alone": [{"role": "system", "content": "x"}],
        "nothing said": [{"role": "user", "content": ""}],
        "no content": [{"role": "user"}],
        "unknown parts": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        "the assistant's image": [{"role": "assistant", "content": [shown]}, user],
        "nine images": [{"role": "user", "content": [shown] * 9}],
        "10,000 messages": [user] * 10_001,
        "10,000 parts": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 10_000}],
        "an image of its own kind": [{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}],
        "a template in it": [{"role": "user", "content": "{{ ''.__class__.__mro__ }}{% include '/etc/passwd' %}"}],
        "100,001 characters": [{"role": "user", "content": "a" * 100_001}],
    }  # fmt: skip
    for name, value in messages.items():
        yield Payload(f"chat: {name}", _json(model="shapes", messages=value), CHAT, accepted=True)
    options: dict[str, dict[str, Any]] = {
        "temperature below 0": {"temperature": -0.5},
        "temperature of 10^300": {"temperature": 1e300},
        "top_p of 0": {"top_p": 0},
        "top_k below 0": {"top_k": -3},
        "min_p of 2": {"min_p": 2},
        "a penalty of 0": {"repetition_penalty": 0},
        "seed of 2^70": {"seed": 2**70},
        "101 stops": {"stop": ["x"] * 101},
        "an empty stop": {"stop": ""},
        "a long stop": {"stop": "x" * 50_000},
        "two answers": {"n": 2},
        "probabilities": {"logprobs": True},
        "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "a schema": {"response_format": {"type": "json_schema"}},
        "biases": {"logit_bias": {"5": 100}},
        "limits that differ": {"max_tokens": 1, "max_completion_tokens": 2},
        "options of another server": {"guided_regex": "(a+)+$"},
        "options of ours that are none": {"gap": {"keep": 2}},
        "unknown options of ours": {"gap": {"kep": 0.5}},
        "stream as text": {"stream": "yes"},
    }
    for name, fields in options.items():
        body = _json(**{"model": "shapes", "messages": [user], **fields})
        yield Payload(f"chat: {name}", body, CHAT, accepted=name in ("temperature of 10^300",))


# ----------------------------------------------------------------------------------------------------------------------
# Header lines, paths and methods


def _of_headers(body: bytes) -> Iterator[Payload]:
    kinds = {"Content-Type": "application/json"}
    yield Payload("header: no type", body, headers={"Content-Type": ""})
    yield Payload("header: a form", body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    yield Payload("header: compressed", zlib.compress(body), headers={**kinds, "Content-Encoding": "gzip"})
    yield Payload("header: 100 kB", body, headers={**kinds, "X-Long": "x" * 100_000})
    yield Payload(
        "header: a number of its own", body, headers={**kinds, "X-Request-Id": "a\tb"}, accepted=True
    )
    yield Payload("header: odd keys", body, headers={**kinds, "Authorization": "Bearer \xff"}, accepted=True)
    yield Payload("body: more than may be", b" " * (21 * 2**20), headers=kinds)
    yield Payload("path: above", b"", "/..%2f..%2fetc/passwd", method="GET")
    yield Payload("path: long", b"", "/v1/models/" + "a" * 5000, method="GET")
    yield Payload("path: broken escapes", b"", "/v1/models/%ff%00%zz", method="GET")
    yield Payload("method: unknown", b"", method="BREW")
    yield Payload("method: another", b"", method="DELETE")
