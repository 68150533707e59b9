"""`GET /v1/models`: what is served, in OpenAI's shape, with what a client of this server wants to know besides."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gap_export.serving.http.errors import HttpError, json_response
from gap_export.serving.numbering import offered
from gap_export.serving.service import Service


class Models:
    """The endpoints.

    Args:
        service: that answers.
        allow_baselines: whether requests may choose position ids that are wrong on purpose.
    """

    def __init__(self, service: Service, *, allow_baselines: bool = False) -> None:
        self._service, self._created = service, int(time.time())
        self._positions = offered(service.bundle.manifest, allow_baselines=allow_baselines)

    async def every(self, request: Request) -> Response:
        """The model, under each of its names."""
        names = (self._service.name, *self._service.aliases)
        return json_response({"object": "list", "data": [self._model(name) for name in names]})

    async def one(self, request: Request) -> Response:
        """The model of a name.

        Raises:
            HttpError: it has another.
        """
        name = request.path_params["model"]
        if not self._service.check_model(name):
            raise HttpError(
                404,
                f"there is no model of this name: it is {self._service.name}",
                param="model",
                code="model_not_found",
            )
        return json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "gap-export",
            "gap": self._facts(),
        }

    def _facts(self) -> dict[str, Any]:
        engine, manifest = self._service.engine, self._service.bundle.manifest
        pruning = manifest.pruning
        return {
            "rows": engine.rows,
            "one_at_a_time_because": engine.single_because,
            "family": manifest.family,
            "precision": manifest.precision,
            "pruner": pruning.pruner,
            "positions": str(pruning.positions),
            "positions_offered": list(map(str, self._positions)),
            "keep": pruning.keep,
            "keep_range": None if pruning.keep_range is None else list(pruning.keep_range),
            "visual_tokens": manifest.spec.visual_tokens,
            "images_per_prompt": manifest.prompt.images,
            "answers_questions": manifest.chat is not None,
            "max_new_tokens": manifest.max_new_tokens,
            "capacity": manifest.capacity,
            "receipts": self._service.gives_receipts,
        }
