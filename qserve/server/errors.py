"""Errors as the OpenAI API words them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from qserve.engine.request import RequestError
from qserve.server.shared_engine import (
    EngineFailedError,
    QueueFullError,
    RequestTimeoutError,
    ServingError,
    UnavailableError,
)

CLIENT_CLOSED_REQUEST = 499


class APIError(Exception):
    """An answer other than 200; `param` is the offending field, where there is one."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> ErrorAnswer:
        kind = _KINDS.get(self.status, _SERVER_ERROR if self.status >= 500 else _INVALID)
        detail = ErrorDetail(message=str(self), type=kind, param=self.param, code=self.code)
        return ErrorAnswer(error=detail)

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


_INVALID, _SERVER_ERROR = "invalid_request_error", "server_error"
_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_STATUS = {
    QueueFullError: 429,
    EngineFailedError: 500,
    UnavailableError: 503,
    RequestTimeoutError: 504,
}
_PASSING = (429, 503)
"""What will pass, so that it is worth trying again."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorDetail


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the API's description says of an endpoint's errors."""
    return {status: {"model": ErrorAnswer} for status in statuses}


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param, code)


def as_api_error(error: ServingError) -> APIError:
    """The answer to a request that the engine did not take on or did not finish."""
    status = _STATUS[type(error)]
    return APIError(
        status, str(error), headers={"Retry-After": "1"} if status in _PASSING else None
    )


def check_model(wanted: str | None, served: str) -> None:
    """Raise APIError if a request names another model than the one that is served."""
    if wanted not in (None, served):
        message = f"model {wanted!r} is not served, only {served!r} is"
        raise APIError(404, message, "model", "model_not_found")


def install_error_handlers(app: FastAPI) -> None:
    """Give every error that is foreseen OpenAI's shape; `RequestContext` does so for the others."""

    @app.exception_handler(APIError)
    async def _api_error(_: Request, error: APIError) -> Response:
        return error.response

    @app.exception_handler(ServingError)
    async def _serving_error(_: Request, error: ServingError) -> Response:
        return as_api_error(error).response

    @app.exception_handler(RequestError)
    async def _request_error(_: Request, error: RequestError) -> Response:
        return invalid(str(error), _field_of(error)).response

    @app.exception_handler(RequestValidationError)
    async def _validation_error(_: Request, error: RequestValidationError) -> Response:
        return _from_validation(error.errors()).response

    @app.exception_handler(HTTPException)
    async def _http_error(_: Request, error: HTTPException) -> Response:
        return APIError(error.status_code, str(error.detail), headers=error.headers).response

    @app.exception_handler(ClientDisconnect)
    async def _disconnect(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def _field_of(error: RequestError) -> str | None:
    """The engine's messages begin with the name of the setting, if one is at fault."""
    first = str(error).split(maxsplit=1)[0]
    return first if first.isidentifier() and first != "the" else None


def _from_validation(problems: Sequence[Mapping[str, Any]]) -> APIError:
    """Word the problems of the first field that has any; a union of types reports one for each."""
    path = problems[0]["loc"][1:]
    if problems[0]["type"] == "value_error" and not path:
        return invalid(_worded(problems[0]))
    if isinstance(problems[0].get("input"), bytes):
        return invalid("the body is not read without the header Content-Type: application/json")
    if problems[0]["type"] == "json_invalid" or not path:
        return invalid(f"the body is not a JSON object: {_worded(problems[0])}")
    field = str(path[0])
    if problems[0]["type"] == "extra_forbidden":
        name = ".".join(map(str, path))
        return invalid(f"{name} is not supported", name, "unsupported_parameter")
    reasons = dict.fromkeys(_worded(problem) for problem in problems if problem["loc"][1] == field)
    return invalid(f"{field}: {' or '.join(reasons)}", field)


def _worded(problem: Mapping[str, Any]) -> str:
    reason = problem.get("ctx", {}).get("error", problem["msg"])
    return str(reason).removeprefix("Input ")
