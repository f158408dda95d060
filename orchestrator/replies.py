"""Refusals over HTTP: one JSON shape for ours and the framework's, and none echoes the input."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from modm_tasks.errors import InvalidInputError, ModmError, RefusedError

log = logging.getLogger(__name__)


def error_body(error: ModmError) -> dict[str, Any]:
    body: dict[str, Any] = {"code": error.code, "message": str(error), "field": error.field}
    if isinstance(error, RefusedError):
        body["retry_after_s"] = error.retry_after_s
    return {"error": body}


def refusal(error: ModmError) -> Response:
    """What a caller is told of an error of ours, and whether to try again."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if isinstance(error, RefusedError):
        headers |= {
            "retry-after": str(max(1, round(error.retry_after_s))),
            "retry-after-ms": str(int(error.retry_after_s * 1000)),
        }
    if error.http_status >= 500:
        log.error("%s", error)
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


def invalid(problems: Sequence[Any]) -> InvalidInputError:
    """The first of pydantic's problems, in one line with its field."""
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"] if part not in {"body", "query", "path"})
    if len(field) > 120 or not field.isprintable():  # a name that the caller made up
        field = ascii(field[:120])[1:-1]
    reason = str(first["msg"]).removeprefix("Value error, ")
    return InvalidInputError(f"{field or 'body'}: {reason}", field=field or None)


def add_error_handlers(app: FastAPI) -> None:
    """Every refusal in one shape, whoever makes it."""
    app.add_exception_handler(ModmError, _modm_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def _modm_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ModmError)
    return refusal(error)


def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return refusal(invalid(error.errors()))


def _http_error(_: Request, error: Exception) -> Response:
    """The framework's own (undecodable body, unknown path, wrong method)."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_input")
    body = {"error": {"code": code, "message": str(error.detail), "field": None}}
    headers = dict(error.headers or {}) | {"x-should-retry": "false"}
    return JSONResponse(body, status_code=error.status_code, headers=headers)
