"""The routes of a server, and one shape for whatever goes wrong on any path."""

import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from erniekit.serve.server_access import Gate
from erniekit.serve.server_adapters import load_adapter, unload_adapter
from erniekit.serve.server_chat import chat
from erniekit.serve.server_completions import complete
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_openapi import document
from erniekit.serve.server_responses import error_response, json_response
from erniekit.serve.server_run import ClientLeft
from erniekit.serve.server_state import Served
from erniekit.serve.server_tokens import detokenize, tokenize
from erniekit.utils import log
from erniekit.utils.version import __version__

Handler = Callable[[HttpRequest, Served], Awaitable[Response]]


def make_app(served: Served) -> Starlette:
    """The application; its engine thread starts and ends with it."""
    routes = [
        _route("/v1/chat/completions", chat, served, "POST"),
        _route("/v1/completions", complete, served, "POST"),
        _route("/tokenize", tokenize, served, "POST"),
        _route("/detokenize", detokenize, served, "POST"),
        _route("/v1/load_lora_adapter", load_adapter, served, "POST"),
        _route("/v1/unload_lora_adapter", unload_adapter, served, "POST"),
        _route("/v1/models", _models, served),
        _route("/v1/models/{name:path}", _model, served),
        _route("/health", _health, served),
        _route("/ping", _health, served),
        _route("/version", _version, served),
        _route("/metrics", _metrics, served),
        _route("/openapi.json", _openapi, served),
    ]
    gate = Middleware(Gate, host=served.cfg.host, allowed_hosts=served.cfg.allowed_hosts, keys=served.keys)
    handlers: Any = {HTTPException: _http_error, ApiError: _api_error, ClientLeft: _nobody, Exception: _defect}
    app = Starlette(routes=routes, middleware=[gate], exception_handlers=handlers, lifespan=partial(_life, served))
    app.router.redirect_slashes = False
    return app


def _route(path: str, handler: Handler, served: Served, method: str = "GET") -> Route:
    async def endpoint(request: HttpRequest) -> Response:
        return await handler(request, served)

    return Route(path, endpoint, methods=[method])


@contextlib.asynccontextmanager
async def _life(served: Served, app: Starlette) -> AsyncIterator[None]:
    served.thread.start(asyncio.get_running_loop())
    try:
        yield
    finally:
        await asyncio.get_running_loop().run_in_executor(None, served.thread.close)
        served.pool.shutdown(wait=False)


async def _models(request: HttpRequest, served: Served) -> Response:
    return json_response(
        {"object": "list", "data": [_described(served, name) for name in (served.name, *served.adapters)]}
    )


async def _model(request: HttpRequest, served: Served) -> Response:
    name = request.path_params["name"]
    served.adapter_of(name)
    return json_response(_described(served, name))


def _described(served: Served, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "erniekit",
        "root": name,
        "parent": None if name == served.name else served.name,
        "max_model_len": served.context,
    }


async def _health(request: HttpRequest, served: Served) -> Response:
    served.require_engine()
    return json_response({"status": "ok"})


async def _version(request: HttpRequest, served: Served) -> Response:
    return json_response({"version": __version__})


async def _metrics(request: HttpRequest, served: Served) -> Response:
    return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _openapi(request: HttpRequest, served: Served) -> Response:
    return json_response(document((served.name, *served.adapters)))


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """No such path, or a method that it does not have."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:100]
    said = {404: f"there is no {path}", 405: f"{path} does not take {request.method[:20]}"}
    message = said.get(error.status_code, str(error.detail))
    return error_response(ApiError(error.status_code, f"{message}.", headers=dict(error.headers or {})))


async def _nobody(request: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)


async def _defect(request: HttpRequest, error: Exception) -> Response:
    log.warning("".join(traceback.format_exception(error)))
    return error_response(ApiError(500, "a defect of the server; its log has the details.", code="internal_error"))
