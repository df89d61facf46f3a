"""The HTTP application: the OpenAI API over a SharedEngine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from transformers import PreTrainedTokenizerBase

import qserve
from qserve.config import ServerConfig
from qserve.server.errors import APIError, check_model, error_answers, install_error_handlers
from qserve.server.generation import GenerationService
from qserve.server.metrics import Metrics
from qserve.server.middleware import REQUEST_ID_HEADER, ApiKeys, BodyLimit, RequestContext
from qserve.server.responses import ChatCompletion, Completion, ModelCard, ModelList
from qserve.server.shared_engine import ServingError, SharedEngine
from qserve.server.text import TextCodec
from qserve.server.tokens import TokenService
from qserve.server.tool_calls import style_of

BODY_SECONDS = 60.0
"""How long a client may take to send a request's body."""

PAGE = Path(__file__).parent / "page"

_DEFAULT = ServerConfig()


def create_app(
    engine: SharedEngine,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    config: ServerConfig = _DEFAULT,
) -> FastAPI:
    """The application; it starts the engine when it starts and ends it when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    app = FastAPI(title="QServe", version=qserve.__version__, lifespan=lifespan)
    install_error_handlers(app)
    _surround(app, config)
    codec, metrics = TextCodec(tokenizer), Metrics(engine, model_name)
    generation = GenerationService(
        engine,
        codec,
        metrics,
        model_name,
        config.request_timeout,
        style_of(tokenizer.chat_template, config.tool_parser),
    )
    _add_generation(app, generation)
    _add_tokens(app, TokenService(codec, model_name))
    _add_page(app)
    _add_status(app, _Status(engine, metrics, model_name))
    return app


def _surround(app: FastAPI, config: ServerConfig) -> None:
    """Add the middleware, from the innermost to the outermost."""
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, max_seconds=BODY_SECONDS)
    if config.api_keys:
        app.add_middleware(ApiKeys, keys=config.api_keys)
    app.add_middleware(RequestContext)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER],
        )


def _add_generation(app: FastAPI, service: GenerationService) -> None:
    errors = error_answers(400, 401, 404, 408, 413, 429, 500, 503, 504)
    options: dict[str, Any] = {"methods": ["POST"], "responses": errors}
    app.add_api_route("/v1/completions", service.completions, response_model=Completion, **options)
    app.add_api_route(
        "/v1/chat/completions", service.chat, response_model=ChatCompletion, **options
    )


def _add_tokens(app: FastAPI, service: TokenService) -> None:
    options: dict[str, Any] = {
        "methods": ["POST"],
        "responses": error_answers(400, 401, 404, 408, 413),
    }
    app.add_api_route("/tokenize", service.tokenize, **options)
    app.add_api_route("/detokenize", service.detokenize, **options)


def _add_status(app: FastAPI, status: _Status) -> None:
    app.add_api_route("/v1/models", status.models, responses=error_answers(401))
    app.add_api_route("/v1/models/{model:path}", status.model, responses=error_answers(401, 404))
    app.add_api_route("/health", status.health, responses=error_answers(503))
    app.add_api_route("/ready", status.ready, responses=error_answers(503))
    app.add_api_route("/metrics", status.metrics, response_class=Response)


def _add_page(app: FastAPI) -> None:
    headers = {"Content-Security-Policy": "default-src 'self'"}

    async def page() -> Response:
        """A chat, and a live view of the engine."""
        return FileResponse(PAGE / "index.html", headers=headers)

    app.add_api_route("/", page, response_class=HTMLResponse)
    app.mount("/page", StaticFiles(directory=PAGE))


class _Status:
    """The endpoints that say what the server is and how it does."""

    def __init__(self, engine: SharedEngine, metrics: Metrics, model_name: str) -> None:
        self._engine = engine
        self._metrics = metrics
        self._card = ModelCard(id=model_name, created=int(time.time()))

    async def models(self) -> ModelList:
        """The one model that is served."""
        return ModelList(data=[self._card])

    async def model(self, model: str) -> ModelCard:
        """The one model that is served, by its name."""
        check_model(model, self._card.id)
        return self._card

    async def health(self) -> dict[str, str]:
        """Liveness: 200 while the engine works, 503 with its error once it has failed for good."""
        if self._engine.failure is not None:
            raise APIError(503, f"the engine has failed: {self._engine.failure}")
        return {"status": "ok"}

    async def ready(self) -> dict[str, str]:
        """Readiness: 200 while requests are taken on, else 503 and the reason."""
        try:
            self._engine.check_ready()
        except ServingError as error:
            raise APIError(503, str(error)) from error
        return {"status": "ok"}

    async def metrics(self) -> Response:
        """Metrics for Prometheus."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_LATEST)
