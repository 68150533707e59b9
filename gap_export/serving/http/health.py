"""Health and metrics: whether the process lives, whether it may be sent requests, and what it has counted."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from gap_export.serving.http.errors import HttpError, json_response
from gap_export.serving.service import Service

LIVE_ALIASES = ("/healthz", "/ping", "/v2/health/live")
READY_ALIASES = ("/health", "/v2/health/ready")
_RETRY_SECONDS = "2"


class Health:
    """The endpoints.

    Args:
        service: that answers.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def live(self, request: Request) -> Response:
        """200 while the process answers; 503 where the engine has failed, and only a new process helps."""
        if self._service.engine.fault is not None:
            return json_response({"status": "failed"}, 503, {"Retry-After": _RETRY_SECONDS})
        return json_response({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """200 while requests are to be sent here; 503 before the session was checked, once the server stops, and where the engine has failed."""
        state = "failed" if self._service.engine.fault is not None else self._service.state
        if state == "ready":
            return json_response({"status": state})
        return json_response({"status": state}, 503, {"Retry-After": _RETRY_SECONDS})

    async def metrics(self, request: Request) -> Response:
        """What was counted, for Prometheus.

        Raises:
            HttpError: nothing is.
        """
        metrics = self._service.metrics
        if metrics is None:
            raise HttpError(404, "this server counts nothing")
        return Response(metrics.render(), headers={"Content-Type": metrics.content_type})
