"""Errors in the shape and with the status of the protocol that the client speaks."""

from __future__ import annotations

import re
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.requests import Request

from teco_kernels.decoder.engine_thread import EngineClosedError, QueueFullError
from teco_kernels.decoder.sampling_params import RequestError

_TGI_STATUS = {400: 422, 413: 422, 500: 424}  # where TGI's differ from OpenAI's
_TGI_KIND = {401: "authentication", 422: "validation", 424: "generation", 429: "overloaded", 503: "generation"}
_EXPECTED = {
    "bool_type": "a boolean",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "an array",
    "string_type": "a string",
}


class ApiError(Exception):
    """An answer other than the one asked for.

    Parameters
    ----------
    status : int
        Of OpenAI's protocol.
    message : str
    param : str, optional
        The parameter that is wrong.
    code : str, optional
        OpenAI's name of the error.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and body for a client of this path."""
        if path.startswith("/v1/"):
            kind = "invalid_request_error" if self.status < 500 else "server_error"
            kind = "rate_limit_error" if self.status == 429 else kind
            return self.status, {
                "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
            }
        status = _TGI_STATUS.get(self.status, self.status)
        return status, {"error": self.message, "error_type": _TGI_KIND.get(status, "request")}

    def response(self, path: str) -> JSONResponse:
        """As an answer to a request of this path."""
        status, body = self.body(path)
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        return JSONResponse(body, status, headers)


def as_api_error(error: Exception) -> ApiError:
    """What an exception of the engine means to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, f"The server is overloaded: {error}", code="overloaded")
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), code="unavailable")
    if isinstance(error, (ValueError, TypeError)) and not isinstance(error, RequestError):
        found = re.match(r"(\w+): ", str(error))
        return ApiError(400, str(error), param=found[1] if found else None, code="invalid_value")
    return ApiError(500, str(error))


def of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    # Of a union, pydantic names the member too: the parameter alone is what the client knows.
    param = ".".join(part for part in place if "[" not in part and part not in ("str", "list")) or None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"Unrecognized request argument supplied: {param!r}", param=param, code="unknown_parameter"
        )
    if first["type"] == "missing":
        if param is None:
            return ApiError(400, "Expected a JSON object as body")
        return ApiError(400, f"Missing required parameter: {param!r}", param=param, code="missing_required_parameter")
    expected = _EXPECTED.get(first["type"])
    if expected is None:
        return ApiError(400, f"Invalid value for {param!r}: {first['msg']}", param=param, code="invalid_value")
    came = f"{first.get('input')!r:.100}"
    return ApiError(
        400, f"Invalid type for {param!r}: expected {expected}, got {came}", param=param, code="invalid_type"
    )


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of a body that is not what it should be."""
    assert isinstance(error, RequestValidationError)
    return of_validation(error).response(request.url.path)


async def on_http_error(request: Request, error: Any) -> JSONResponse:
    """Handler of unknown paths, methods, and bodies that cannot be read."""
    path = request.url.path
    response = ApiError(error.status_code, f"{error.detail}: {request.method} {path!r}").response(path)
    response.headers.update(error.headers or {})
    return response


async def on_any_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of what nobody expected; the server's log has the traceback."""
    return ApiError(500, f"Internal error: {type(error).__name__}").response(request.url.path)
