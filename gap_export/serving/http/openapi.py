"""`GET /openapi.json`: what the endpoints take and give, from the very models that bodies are checked with."""

from __future__ import annotations

import base64
import io
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from PIL import Image
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gap_export.serving.http.ground import GroundRequest
from gap_export.serving.http.infer import InferRequest
from gap_export.serving.http.openai_fields import ChatRequest

_BODIES: tuple[type[BaseModel], ...] = (GroundRequest, InferRequest, ChatRequest)
_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_SAID = {
    400: "The request is wrong; the message names the field.",
    401: "A key is needed.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body, or an image, has too many bytes.",
    415: "The body is no uncompressed JSON.",
    422: "An image cannot be decoded, is too small or too large.",
    429: "The address has too many connections, or sends too much at once.",
    431: "The header is too large.",
    503: "The queue is full, the server is not ready, stops, or failed: see its code; ask again after Retry-After seconds.",
    504: "There was no answer before the deadline.",
}


def body_of(model: type[BaseModel], name: str) -> dict[str, Any]:
    """What an endpoint's `openapi_extra` says of its body.

    Args:
        model: that bodies are checked with.
        name: of what is served, for the example.
    """
    schema = {"$ref": _REF.format(model=model.__name__)}
    content = {"schema": schema, "example": _example(model, name)}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def _example(model: type[BaseModel], name: str) -> dict[str, Any]:
    """A body that is answered, about a small image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 40, 40)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    question = "the red circle"
    if model is GroundRequest:
        return {"image": url, "expression": question}
    if model is InferRequest:
        return {"input": [{"type": "image_url", "url": url}], "labels": [question]}
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"model": name, "messages": [{"role": "user", "content": parts}], "max_tokens": 8}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an endpoint's `responses` say of failures.

    Args:
        statuses: that it may answer with, besides success.
    """
    schema = {"$ref": _REF.format(model="Error")}
    return {
        status: {"description": _SAID[status], "content": {"application/json": {"schema": schema}}}
        for status in statuses
    }


EVERY = tuple(_SAID)


def describe(app: FastAPI, version: str) -> None:
    """Have an application describe itself.

    Args:
        app: with all its routes.
        version: of this package.
    """

    def made() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title="gap-export serve",
                version=version,
                summary="A grounding server that says what it computed.",
                routes=app.routes,
            )
            _, defined = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REF)
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(defined.get("$defs", {}), Error=_ERROR)
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = made  # type: ignore[method-assign]
