"""``POST /v1/requests`` with no more of the framework than it needs: it is the call that a crowd makes.

A sampled profile of 200 submits a second gave a quarter of the orchestrator's time to the framework: routing, dependency
injection and eight layers of middleware. `SubmitFirst` stands before them and answers this one call; the application has
the same route for its OpenAPI document and for whoever mounts it elsewhere. Both end in `answer`, so there is one behaviour.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from modm_tasks.errors import InvalidInputError, ModmError
from modm_tasks.messages import SubmitRequest
from orchestrator.auth import Caller, Gate
from orchestrator.replies import invalid, refusal
from orchestrator.service import Service

PATH = "/v1/requests"
#: More than twice the longest request that is valid, with every character escaped.
MAX_BODY_BYTES = 256 * 1024

_JSON = re.compile(r"application/([\w.+-]+\+)?json\s*(;|$)", re.IGNORECASE)


class SubmitFirst:
    """ASGI: takes single submits itself, once the application has started, and hands all else to ``app``."""

    def __init__(self, app: FastAPI, gate: Gate) -> None:
        self.app: ASGIApp = app
        self._state, self._gate = app.state, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await answer(request, self._state.service, self._gate)
        except ModmError as error:
            response = refusal(error)
        await response(scope, receive, send)


async def answer(request: Request, service: Service, gate: Gate) -> Response:
    """Accept one request: durable when this returns, with its record. Raises ModmError."""
    caller = gate.check(request.headers.get("authorization"), "submit")
    given = as_caller(parse(await read(request)), caller, request.headers.get("idempotency-key"))
    gate.admit(caller, 1)
    if service.slow_to_check:
        record = await run_in_threadpool(service.submit, given)
    else:
        record = await asyncio.wrap_future(service.acceptor.put(given))
    return Response(record.model_dump_json(), status_code=202, media_type="application/json")


async def read(request: Request) -> bytes:
    """The body. Raises InvalidInputError where it is not said to be JSON, or is too long.

    Other types are refused because any web page may send those to a service on the reader's own machine unasked.
    """
    if not _JSON.match(request.headers.get("content-type", "")):
        raise InvalidInputError("Content-Type must be application/json", field="Content-Type")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise InvalidInputError(f"body: the limit is {MAX_BODY_BYTES} bytes", field="body")
    return body


def parse(body: bytes) -> SubmitRequest:
    """Raises InvalidInputError that names the field, without echoing what was sent."""
    try:
        return SubmitRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False, include_context=False)) from error


def as_caller(request: SubmitRequest, caller: Caller, key: str | None = None) -> SubmitRequest:
    """The client's name comes from its key, so that nobody can speak for another."""
    changes: dict[str, Any] = {}
    if caller.client:
        changes["client"] = caller.client
    if key:
        if len(key) > 200:
            raise InvalidInputError("Idempotency-Key: the limit is 200 characters", field="Idempotency-Key")
        changes["idempotency_key"] = key
    return request.model_copy(update=changes) if changes else request
