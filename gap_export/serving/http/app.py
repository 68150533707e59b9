"""The application: endpoints behind keys, limits and a journal."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gap_export import __version__
from gap_export.errors import GapExportError, InputError, RecipeError
from gap_export.serving.http.auth import METRICS, Authentication
from gap_export.serving.http.completions import Completions
from gap_export.serving.http.errors import HttpError, http_error
from gap_export.serving.http.ground import Grounding, GroundRequest
from gap_export.serving.http.health import LIVE_ALIASES, READY_ALIASES, Health
from gap_export.serving.http.infer import Inference, InferRequest
from gap_export.serving.http.journal import LOG, Journal, where
from gap_export.serving.http.limits import Limits
from gap_export.serving.http.models import Models
from gap_export.serving.http.openai_fields import ChatRequest
from gap_export.serving.http.openapi import EVERY, body_of, describe, failures
from gap_export.serving.http.page import page_routes
from gap_export.serving.http.settings import HttpSettings
from gap_export.serving.images import RequestImages
from gap_export.serving.service import Service
from gap_export.serving.work import Refused

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(service: Service, settings: HttpSettings) -> FastAPI:
    """The application of a service.

    Args:
        service: that answers.
        settings: of keys, limits and images.

    Returns:
        An ASGI application; connections are the server's to bound, see `connections`.
    """
    app = FastAPI(
        title="gap-export serve",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        openapi_url="/openapi.json",
    )
    images = RequestImages(settings.images, settings.remote)
    _add_questions(app, service, settings, images)
    _add_facts(app, service, settings)
    app.router.routes.extend(page_routes(settings.page))
    describe(app, __version__)
    app.add_exception_handler(HttpError, _of_http)
    app.add_exception_handler(GapExportError, _of_package)
    app.add_exception_handler(HTTPException, _of_framework)
    # The last one added is the first that a request meets.
    app.add_middleware(Authentication, keys=settings.keys, protect_metrics=settings.protect_metrics)
    app.add_middleware(Limits, settings=settings)
    app.add_middleware(Journal)
    return app


def _add_questions(app: FastAPI, service: Service, settings: HttpSettings, images: RequestImages) -> None:
    for path, endpoint, body, said in (
        ("/v1/ground", Grounding(service, settings, images), GroundRequest, "Boxes of what is asked for."),
        ("/v1/infer", Inference(service, settings, images), InferRequest, "Boxes, label by label."),
        (
            "/v1/chat/completions",
            Completions(service, settings, images),
            ChatRequest,
            "The answer, or a stream of its pieces.",
        ),
    ):
        app.add_api_route(
            path,
            _endpoint(endpoint),
            methods=["POST"],
            name=path.rpartition("/v1/")[2].replace("/", "_"),
            response_class=Response,
            responses={**failures(*EVERY), 200: _answer(said, streams=body is ChatRequest)},
            openapi_extra={**body_of(body, service.name), "security": [{"key": []}] if settings.keys else []},
        )


def _add_facts(app: FastAPI, service: Service, settings: HttpSettings) -> None:
    models = Models(service, allow_baselines=settings.allow_baselines)
    health = Health(service)
    for path, endpoint, name, said in (
        ("/v1/models", models.every, "models", "What is served."),
        ("/v1/models/{model:path}", models.one, "model", "One model."),
        ("/v1/health/live", health.live, "live", "The process answers."),
        ("/v1/health/ready", health.ready, "ready", "Requests may be sent."),
        (METRICS, health.metrics, "metrics", "What was counted, for Prometheus."),
    ):
        app.add_api_route(
            path,
            _endpoint(endpoint),
            methods=["GET"],
            name=name,
            response_class=Response,
            responses={**failures(400, 401, 404, 429, 431, 503), 200: {"description": said}},
            openapi_extra={"parameters": [_model(service.name)]} if name == "model" else None,
        )
        app.add_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    for aliases, endpoint in ((LIVE_ALIASES, health.live), (READY_ALIASES, health.ready)):
        for path in aliases:
            app.add_route(path, endpoint, methods=["GET"], include_in_schema=False)


def _endpoint(call: Endpoint) -> Endpoint:
    """A function of the one argument that the framework gives."""

    async def endpoint(request: Request) -> Response:
        return await call(request)

    return endpoint


def _answer(said: str, *, streams: bool) -> dict[str, object]:
    content: dict[str, object] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {}
    return {"description": said, "content": content}


def _model(name: str) -> dict[str, object]:
    return {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "example": name}


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.response()


async def _of_package(request: Request, error: Exception) -> Response:
    assert isinstance(error, GapExportError)
    if not isinstance(error, InputError | RecipeError | Refused):
        LOG.error("request %s failed: %s", request.scope["state"].get("request_id"), where(error))
    return http_error(error).response()


async def _of_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this path", 405: "this path does not take this method"}
    message = words.get(error.status_code, "the request cannot be answered")
    return HttpError(error.status_code, message, headers=error.headers).response()
