"""Errors in OpenAI's shape, for every status that the gateway answers with."""

import logging
import math
import reprlib
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from scission.common.errors import ScissionError
from scission.services.gateway.openai.context import CALLER_KEY

logger = logging.getLogger(__name__)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 40
_SHORT.maxlist = _SHORT.maxdict = 3
_SHORT.maxlevel = 2

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}


def error_body(
    message: str, error_type: str, *, param: str | None = None, code: str | None = None
) -> bytes:
    """The JSON text {"error": {...}}."""
    error = {"message": message, "type": error_type, "param": param, "code": code}
    return orjson.dumps({"error": error})


def body_of(error: Exception) -> bytes:
    """The error's JSON text; what is not one of ours shows no detail."""
    if isinstance(error, ScissionError):
        return error_body(error.message, error.error_type, param=error.param, code=error.code)
    return error_body("The server had an internal error.", "internal_error")


def response_of(error: Exception) -> Response:
    if not isinstance(error, ScissionError):
        return _json(500, body_of(error))
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.http_status in (429, 503):
        headers["Retry-After"] = "1"
    return _json(error.http_status, body_of(error), headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the app, FastAPI's own included, come out in OpenAI's shape."""

    @app.exception_handler(ScissionError)
    async def ours(request: Request, error: ScissionError) -> Response:
        if error.http_status >= 500:
            logger.warning(
                "%s %s failed: %s request_id=%s",
                *(request.method, request.url.path, error.message),
                request.scope[CALLER_KEY].external_id,
            )
        return response_of(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = describe_validation(error.errors())
        return _json(400, error_body(message, "invalid_request_error", param=param))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        status = error.status_code
        message = str(error.detail)
        if status == 404:
            message = f"{request.method} {request.url.path[:200]} does not exist; see /docs."
        elif status == 405:
            message = f"{request.method} is not allowed for {request.url.path[:200]}."
        default = "invalid_request_error" if status < 500 else "internal_error"
        code = HTTPStatus(status).phrase.lower().replace(" ", "_")
        body = error_body(message, _TYPES.get(status, default), code=code)
        return _json(status, body, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return response_of(error)


def describe_validation(errors: Iterable[Any]) -> tuple[str, str | None]:
    """The first problem as a sentence, and the field at fault as `param`."""
    problem = next(iter(errors), None)
    if problem is None:
        return "The request is invalid.", None
    path = [str(part) for part in problem.get("loc", ())[1:] if not _is_union_branch(part)]
    kind = problem.get("type")
    if kind == "json_invalid":
        detail = problem.get("ctx", {}).get("error", "")
        return f"The body is no valid JSON: {detail}.", None
    if not path:
        return "The body must be a JSON object.", None
    param = ".".join(path)
    if kind == "missing":
        return f"{param}: this field is required.", param
    text = str(problem.get("msg", "is invalid")).removeprefix("Value error, ")
    return f"{param}: {text} (got {_SHORT.repr(problem.get('input'))})", param


def _is_union_branch(part: int | str) -> bool:
    """Whether pydantic put this into the location for a branch of a union: a type or a tag."""
    if isinstance(part, int):
        return False
    return not part.isidentifier() or part[0].isupper() or part in ("str", "int", "float", "bool")


def _json(status: int, body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status_code=status, headers=headers, media_type="application/json")
