"""The gateway's HTTP application, put together from its parts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Response
from starlette.middleware.cors import CORSMiddleware

from scission.common.config import HttpOptions
from scission.common.metrics import HttpMetrics, Metrics, RequestMetrics
from scission.services.gateway.chat.format import ChatFormat
from scission.services.gateway.engine import Engine, ReadyState, RequestIds
from scission.services.gateway.http_edge import HttpEdge
from scission.services.gateway.openai.context import ServingContext
from scission.services.gateway.openai.errors import error_body, install_error_handlers
from scission.services.gateway.openai.routes import make_openai_router
from scission.services.gateway.served_model import ServedModel
from scission.services.gateway.tokenizer import TextEncoder, Tokenizer


@dataclass(frozen=True, slots=True)
class AppDependencies:
    """The application's parts; `routers` are the cluster side's own routes (/workers, ...)."""

    engine: Engine
    model: ServedModel
    tokenizer: Tokenizer
    chat_format: ChatFormat
    request_ids: RequestIds
    metrics: Metrics
    version: str
    options: HttpOptions
    routers: Sequence[APIRouter] = ()


def create_app(deps: AppDependencies, **fastapi_options: Any) -> FastAPI:
    """The ASGI application; `fastapi_options` (for instance a lifespan) are FastAPI's own."""
    app = FastAPI(
        title="Scission",
        version=deps.version,
        root_path=deps.options.root_path,
        **fastapi_options,
    )
    install_error_handlers(app)
    context = ServingContext(
        engine=deps.engine,
        model=deps.model,
        tokenizer=deps.tokenizer,
        encoder=TextEncoder(deps.tokenizer),
        chat_format=deps.chat_format,
        options=deps.options,
        metrics=RequestMetrics(deps.metrics),
        request_ids=deps.request_ids,
        seeds=random.SystemRandom(),
    )
    app.include_router(_make_status_router(deps))
    app.include_router(make_openai_router(context))
    for router in deps.routers:
        app.include_router(router)
    if deps.options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(deps.options.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    app.add_middleware(
        HttpEdge,
        metrics=HttpMetrics(deps.metrics),
        max_body_bytes=deps.options.max_body_bytes,
        has_access_log=deps.options.access_log,
    )
    return app


def _make_status_router(deps: AppDependencies) -> APIRouter:
    router = APIRouter(tags=["status"])

    # HEAD, too: that is what some load balancers probe with.
    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> Response:
        """Liveness: the process answers."""
        return _json({"status": "ok"})

    @router.head("/ready", include_in_schema=False)
    @router.head("/readyz", include_in_schema=False)
    @router.get("/ready")
    @router.get("/readyz", include_in_schema=False)
    async def ready() -> Response:
        """Readiness: a prefill and a decode that fit together both answer."""
        readiness = deps.engine.readiness()
        answer: dict[str, Any] = {"status": readiness.state, "workers": readiness.workers}
        if readiness.state is ReadyState.READY:
            return _json(answer)
        message = readiness.reason or f"The service is {readiness.state}."
        error = orjson.loads(error_body(message, "service_unavailable", code="service_unavailable"))
        return _json({**answer, **error}, status=503, headers={"Retry-After": "1"})

    @router.get("/version")
    async def version() -> Response:
        return _json({"version": deps.version})

    @router.get("/ping")
    @router.post("/ping")
    async def ping() -> Response:
        return Response(status_code=200)

    @router.get("/load")
    async def load() -> Response:
        """Figures that a router in front of several gateways may balance by."""
        return _json(dict(deps.engine.load()))

    @router.get("/metrics")
    async def metrics() -> Response:
        text, content_type = deps.metrics.render()
        return Response(text, headers={"Content-Type": content_type})

    return router


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        orjson.dumps(value), status_code=status, headers=headers, media_type="application/json"
    )
