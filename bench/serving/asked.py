"""Requests of every kind, and what each is answered with when it is the only one: text, boxes and visual tokens, made by `gap.load`."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from PIL import Image

from gap_export.boxes.scenes import DEV_SEED, make_scene, queries
from gap_export.runtime.model import Model
from serving.wire import Reply, request_bytes

Kind = Literal["ground", "several", "infer", "chat", "stream"]
KINDS: tuple[Kind, ...] = ("ground", "several", "infer", "chat", "stream")
SHARES: dict[Kind, float] = {"ground": 0.4, "several": 0.15, "infer": 0.1, "chat": 0.15, "stream": 0.2}
"""Of all requests."""
KEEPS: tuple[float | None, ...] = (None, 0.1, 0.25, 0.5, 1.0)
_PATHS = {"infer": "/v1/infer", "chat": "/v1/chat/completions", "stream": "/v1/chat/completions"}
_NEAR = 1e-6
"""Boxes travel as decimal fractions."""


@dataclass(frozen=True)
class Said:
    """One answer.

    Attributes:
        text: as generated; None where the endpoint does not tell.
        boxes: (x1, y1, x2, y2) as fractions of the image.
        kept: visual tokens; None where the endpoint does not tell.
    """

    text: str | None
    boxes: tuple[tuple[float, ...], ...]
    kept: int | None


@dataclass(frozen=True)
class Shown:
    """An image, once decoded and once as it is sent.

    Attributes:
        image: RGB.
        url: a data URL of it.
    """

    image: Image.Image
    url: str


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        kind: which endpoint, and how.
        number: of its image.
        shown: the image.
        texts: expressions, or one question.
        keep: fraction of the visual tokens; None leaves it to the server.
        max_new_tokens: longest answer; None for the bundle's own.
    """

    kind: Kind
    number: int
    shown: Shown
    texts: tuple[str, ...]
    keep: float | None = None
    max_new_tokens: int | None = None

    @property
    def path(self) -> str:
        """Of the endpoint."""
        return _PATHS.get(self.kind, "/v1/ground")

    @cached_property
    def sent(self) -> bytes:
        """The whole request."""
        return request_bytes("POST", self.path, self.body)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent as JSON."""
        keep = {} if self.keep is None else {"keep": self.keep}
        longest = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        if self.kind in ("ground", "several"):
            return {"image": self.shown.url, "expressions": list(self.texts), **keep, **longest}
        if self.kind == "infer":
            image = {"type": "image_url", "url": self.shown.url}
            return {"input": [image], "labels": list(self.texts), **keep, **longest}
        content = [
            {"type": "image_url", "image_url": {"url": self.shown.url}},
            {"type": "text", "text": self.texts[0]},
        ]
        streamed = (
            {"stream": True, "stream_options": {"include_usage": True}} if self.kind == "stream" else {}
        )
        tokens = {} if self.max_new_tokens is None else {"max_tokens": self.max_new_tokens}
        return {
            "model": "shapes",
            "messages": [{"role": "user", "content": content}],
            **({"gap": keep} if keep else {}),
            **streamed,
            **tokens,
        }

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kind}, image {self.number}, keep {self.keep}, {' | '.join(self.texts)}"


def shown(image: Image.Image, kind: str = "PNG", **options: Any) -> Shown:
    """An image as it is sent, and as it is decoded again.

    Args:
        image: RGB.
        kind: of the file.
        options: of Pillow's encoder.
    """
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Shown(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"), url)


def mixture(
    images: int, kinds: Sequence[Kind] = KINDS, keeps: Sequence[float | None] = KEEPS, **options: Any
) -> list[Request]:
    """Requests: of every image each kind with each share of visual tokens, expressions short, middling and long in turn.

    Args:
        images: how many.
        kinds: of requests.
        keeps: shares of the visual tokens.
        options: further ones of every request.
    """
    made = []
    for number in range(images):
        scene = make_scene(DEV_SEED, number)
        by_length = sorted(
            {query.expression for query in queries(scene.objects)}, key=lambda text: (len(text.split()), text)
        )
        three = (by_length[0], by_length[len(by_length) // 2], by_length[-1])
        image = shown(Image.fromarray(scene.pixels))
        for place, kind in enumerate(kinds):
            for step, keep in enumerate(keeps):
                one = three[(number + place + step) % 3]
                texts = {
                    "several": three,
                    "infer": three[: 1 + step % 2],
                    "chat": (f"where is {one}?",),
                    "stream": (f"where is {one}?",),
                }.get(kind, (one,))
                made.append(Request(kind, number, image, texts, keep, **options))
    return made


def weights(requests: Iterable[Request]) -> list[float]:
    """How often each is sent, relative to the others: kinds by their shares."""
    listed = list(requests)
    count = {kind: sum(request.kind == kind for request in listed) for kind in KINDS}
    return [SHARES[request.kind] / count[request.kind] for request in listed]


def alone(model: Model, request: Request, keep: float | None) -> tuple[Said, ...]:
    """What a request is answered with when it is the only one.

    Args:
        model: loaded.
        request: of `mixture`.
        keep: fraction of the visual tokens.
    """
    image, longest = request.shown.image, request.max_new_tokens
    if request.kind in ("chat", "stream"):
        reply = model.ask(request.texts[0], image, keep=keep, max_new_tokens=longest)
        return (Said(reply.text, fractions(reply.boxes, image.size), len(reply.kept_indices)),)
    answers = [model.ground(image, text, keep=keep, max_new_tokens=longest) for text in request.texts]
    return tuple(
        Said(each.text, fractions(each.boxes, image.size), len(each.kept_indices)) for each in answers
    )


def fractions(boxes: Iterable[Sequence[float]], size: tuple[int, int]) -> tuple[tuple[float, ...], ...]:
    """Boxes in pixels as fractions of an image of that width and height."""
    return tuple(tuple(edge / side for edge, side in zip(box, size * 2, strict=True)) for box in boxes)


def said_in(request: Request, reply: Reply) -> tuple[tuple[Said, ...], float | None]:
    """What an answer says.

    Args:
        request: that it answers.
        reply: with status 200.

    Returns:
        (one for each text, the fraction of visual tokens that it reports; None where the endpoint does not tell).

    Raises:
        ValueError: it is not complete, or not of this endpoint.
        KeyError: the same.
    """
    if request.kind == "stream":
        return _said_in_events(reply.body)
    body = reply.json
    if request.kind == "infer":
        (data,) = body["data"]
        return tuple(Said(None, _edges(data["bounding_boxes"][text]), None) for text in request.texts), None
    if request.kind == "chat":
        (choice,) = body["choices"]
        return _said_by_chat(choice["message"]["content"], body["gap"])
    results = body["results"]
    if [result["expression"] for result in results] != list(request.texts):
        raise ValueError("the answer has other expressions")
    said = [Said(each["raw"], _edges(each["boxes"]), each["keep"]["tokens"]) for each in results]
    (used,) = {each["keep"]["used"] for each in results}
    return tuple(said), used


def _said_in_events(body: bytes) -> tuple[tuple[Said, ...], float | None]:
    events = [event.removeprefix("data: ") for event in body.decode().split("\n\n") if event]
    if events[-1:] != ["[DONE]"]:
        raise ValueError("the stream does not end with [DONE]")
    text, ours = "", None
    for event in map(json.loads, events[:-1]):
        for choice in event["choices"]:
            text += choice["delta"].get("content", "")
        ours = event.get("gap", ours)
    if ours is None:
        raise ValueError("the stream does not say how its answer was made")
    return _said_by_chat(text, ours)


def _said_by_chat(text: str, ours: dict[str, Any]) -> tuple[tuple[Said, ...], float | None]:
    return (Said(text, _edges(ours["boxes"]), ours["keep"]["tokens"]),), ours["keep"]["used"]


def _edges(boxes: Iterable[dict[str, Any]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(box[name] for name in ("x_min", "y_min", "x_max", "y_max")) for box in boxes)


def equal(mine: Sequence[Said], theirs: Sequence[Said]) -> bool:
    """Whether two answers are the same in everything that both tell.

    Args:
        mine: one for each text.
        theirs: the same of another.
    """
    return len(mine) == len(theirs) and all(
        _told_equal(one.text, other.text)
        and _told_equal(one.kept, other.kept)
        and len(one.boxes) == len(other.boxes)
        and all(
            math.isclose(edge, same, abs_tol=_NEAR)
            for box, like in zip(one.boxes, other.boxes, strict=True)
            for edge, same in zip(box, like, strict=True)
        )
        for one, other in zip(mine, theirs, strict=True)
    )


def _told_equal(mine: object, theirs: object) -> bool:
    return mine is None or theirs is None or mine == theirs
