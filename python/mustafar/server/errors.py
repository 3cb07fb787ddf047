"""Errors as OpenAI's API says them: a status, and an object with message, type, param and code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .. import _core

_LONGEST_MESSAGE = 600  # characters: a message may quote what the client sent


class ApiError(Exception):
    """What a client is told went wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        message = str(self)
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + " ..."
        return {
            "error": {
                "message": message,
                "type": _type_of(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The answer that says it."""
        return JSONResponse(self.body, self.status, self.headers)


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def refused(name: str, why: str) -> ApiError:
    """A field that is known and not served."""
    return ApiError(400, f"{name} {why}", "unsupported_parameter", name)


@contextmanager
def client_errors(body: Mapping[str, Any]) -> Iterator[None]:
    """Inside, what the library refuses is the client's error, in a field of the body."""
    try:
        yield
    except _core.QueueFull:
        raise
    except _core.ContextOverflow as error:
        raise ApiError(400, str(error), "context_length_exceeded", _prompt_of(body)) from error
    except _core.TemplateError as error:
        raise ApiError(400, str(error), "invalid_messages", "messages") from error
    except _core.OutOfMemory as error:
        raise ApiError(400, str(error), "kv_budget_exceeded", _prompt_of(body)) from error
    except ImportError as error:  # an extra, such as that of structured output
        param = "response_format" if "response_format" in body else None
        raise ApiError(400, str(error), "unsupported_value", param) from error
    except RecursionError as error:
        message = "the request is nested too deeply"
        raise ApiError(400, message, "invalid_value") from error
    except UnicodeEncodeError as error:
        message = "a text of the request has a lone surrogate, which is no character"
        raise ApiError(400, message, "invalid_value") from error
    except TypeError as error:
        raise _of_field(error, "invalid_type", body) from error
    except ValueError as error:
        raise _of_field(error, "invalid_value", body) from error


def _of_field(error: Exception, code: str, body: Mapping[str, Any]) -> ApiError:
    message = str(error)
    if unknown := re.match(r"unknown sampling parameter '(.*?)'", message):
        name = unknown[1]
        return ApiError(400, f"unknown field {name!r}", "unknown_parameter", name)
    named = re.match(r"\w+", message)  # messages begin with what is wrong
    param = named[0] if named and named[0] in body else None
    if named and named[0] == "json_schema" and "response_format" in body:
        param = "response_format"
    if param in ("response_format", "tool_choice") and code == "invalid_value":
        code = "unsupported_value"
    return ApiError(400, message, code, param)


def flag_field(body: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false, or not there: false."""
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ApiError(400, f"{name} must be true or false, not {value!r}", "invalid_type", name)


def _prompt_of(body: Mapping[str, Any]) -> str:
    return "messages" if "messages" in body else "prompt"


def queue_full(retry_after: int) -> ApiError:
    """More requests wait than may; the client is told when to come back."""
    message = "too many requests wait already; try again later"
    return ApiError(429, message, "queue_full", headers={"Retry-After": str(retry_after)})


def internal_error() -> ApiError:
    """Our own fault; what it was stands in the log alone."""
    return ApiError(500, "the server failed at this request", "internal_error")


def of_http(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown routes, wrong methods."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 404:
        known = ApiError(404, f"there is no {path}", "unknown_url")
    elif error.status_code == 405:
        known = ApiError(405, f"{path} is not for {method}", "method_not_allowed")
    else:
        known = ApiError(error.status_code, str(error.detail), "http_error")
    known.headers.update(error.headers or {})
    return known.response()


def of_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads it; for the log."""
    return Response(status_code=499)


def of_api(request: Request, error: Exception) -> Response:
    """An :class:`ApiError` that a route has raised."""
    assert isinstance(error, ApiError)
    return error.response()


def of_failure(request: Request, error: Exception) -> Response:
    """Anything else."""
    return internal_error().response()
