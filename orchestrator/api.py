"""The HTTP API: the service by FastAPI. Errors of ours become one JSON shape; OpenAPI is at /docs and /openapi.json."""

# Annotations are evaluated here, not postponed: FastAPI must see dependencies that are made inside functions.
import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from modm_tasks import __version__
from modm_tasks.errors import InvalidInputError, ModmError, NotFoundError, RefusedError
from modm_tasks.messages import RequestRecord, State, SubmitRequest
from orchestrator.auth import Caller, Gate
from orchestrator.service import Service

log = logging.getLogger(__name__)
MAX_BATCH = 256
MAX_WAIT_S = 300.0
PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}}


class Batch(BaseModel):
    """Several requests in one call."""

    model_config = ConfigDict(extra="forbid")
    requests: list[SubmitRequest] = Field(min_length=1, max_length=MAX_BATCH)


def error_body(error: ModmError) -> dict[str, Any]:
    body: dict[str, Any] = {"code": error.code, "message": str(error), "field": error.field}
    if isinstance(error, RefusedError):
        body["retry_after_s"] = error.retry_after_s
    return {"error": body}


def _modm_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ModmError)
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if isinstance(error, RefusedError):
        headers |= {
            "retry-after": str(max(1, round(error.retry_after_s))),
            "retry-after-ms": str(int(error.retry_after_s * 1000)),
        }
    if error.http_status >= 500:
        log.error("%s", error)
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part not in {"body", "query", "path"})
    if len(field) > 120 or not field.isprintable():  # a name that the caller made up
        field = ascii(field[:120])[1:-1]
    reason = str(first["msg"]).removeprefix("Value error, ")
    return _modm_error(_, InvalidInputError(f"{field or 'body'}: {reason}", field=field or None))


def _http_error(_: Request, error: Exception) -> Response:
    """FastAPI's own refusals (undecodable body, unknown path, wrong method) in the same shape as ours."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_input")
    body = {"error": {"code": code, "message": str(error.detail), "field": None}}
    headers = dict(error.headers or {}) | {"x-should-retry": "false"}
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Every refusal in one shape, ours and the framework's, without echoing the input."""
    app.add_exception_handler(ModmError, _modm_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def build_app(
    make_service: Callable[[], Service], gate: Gate, *, routers: Callable[[Service], list[APIRouter]] | None = None
) -> FastAPI:
    """The application. The service is made at start-up, in the process that serves."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = make_service()
        app.state.service = service
        if routers is not None:
            for router in routers(service):
                app.include_router(router)
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(title="MoDM serving", version=__version__, lifespan=lifespan)
    app.state.gate = gate
    add_error_handlers(app)
    from orchestrator.api_images import router as images_router

    app.include_router(health_routes())
    app.include_router(request_routes(gate))
    app.include_router(images_router(gate))
    return app


async def service_of(request: Request) -> Service:
    """Async, because FastAPI would take a thread for it otherwise: a millisecond at every call."""
    service: Service = request.app.state.service
    return service


Svc = Annotated[Service, Depends(service_of)]


def health_routes() -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok", "version": __version__}

    @router.get("/readyz", responses={503: {}})
    def readyz(service: Svc) -> Response:
        """A submit would be accepted now; says what is wrong where not."""
        health = service.health()
        return JSONResponse(health, status_code=200 if health["ready"] else 503)

    return router


def own(record: RequestRecord, caller: Caller) -> RequestRecord:
    """A client sees its own requests; an administrator sees all. Others' are reported as not there."""
    if caller.admin or record.request.client == caller.client:
        return record
    raise NotFoundError(f"no request {record.id}")


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


def request_routes(gate: Gate) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["requests"])
    submit = Annotated[Caller, Depends(gate.require("submit"))]
    read = Annotated[Caller, Depends(gate.require("read"))]
    admin = Annotated[Caller, Depends(gate.require("admin"))]

    @router.post("/requests", status_code=202, response_model=RequestRecord)
    async def submit_one(
        body: SubmitRequest, service: Svc, caller: submit, idempotency_key: Annotated[str | None, Header()] = None
    ) -> Response:
        """Accept one prompt. Durable when this answers."""
        gate.admit(caller, 1)
        given = as_caller(body, caller, idempotency_key)
        if service.slow_to_check:
            record = await run_in_threadpool(service.submit, given)
        else:
            record = await asyncio.wrap_future(service.acceptor.put(given))
        # As bytes: the framework would check what is a checked model already, on another thread.
        return Response(record.model_dump_json(), status_code=202, media_type="application/json")

    @router.post("/requests/batch", status_code=202)
    def submit_batch(body: Batch, service: Svc, caller: submit) -> list[RequestRecord]:
        """Accept several prompts, in order."""
        gate.admit(caller, len(body.requests))
        return service.submit_many([as_caller(r, caller) for r in body.requests])

    @router.get("/requests")
    def list_requests(
        service: Svc,
        caller: read,
        state: State | None = None,
        client: Annotated[str | None, Query(max_length=128)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    ) -> list[RequestRecord]:
        """Newest first."""
        return service.list(state=state, client=client if caller.admin else caller.client, limit=limit)

    @router.get("/requests/{request_id}")
    def get_request(
        request_id: str,
        service: Svc,
        caller: read,
        wait_s: Annotated[float, Query(ge=0, le=MAX_WAIT_S)] = 0.0,
        admitted: bool = False,
    ) -> RequestRecord:
        """How a request stands; ``wait_s`` holds the answer until it has ended, or until then."""
        record = own(service.get(request_id), caller)
        return service.wait(request_id, wait_s, admitted=admitted) if wait_s else record

    @router.get("/requests/{request_id}/image", responses=PNG, response_class=Response)
    def get_image(request_id: str, service: Svc, caller: read) -> Response:
        """The result, as PNG."""
        own(service.get(request_id), caller)
        data = service.parts.images.read_bytes(service.image_uri(request_id))
        return Response(data, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    @router.get("/requests/{request_id}/source", responses=PNG, response_class=Response)
    def get_source(request_id: str, service: Svc, caller: read) -> Response:
        """The cached image that a hit was refined from."""
        record = own(service.get(request_id), caller)
        if record.decision is None or record.decision.source_uri is None:
            raise NotFoundError(f"request {request_id} was not refined from a cached image")
        return Response(service.parts.images.read_bytes(record.decision.source_uri), media_type="image/png")

    @router.get("/requests/{request_id}/explain")
    def explain(request_id: str, service: Svc, caller: read) -> dict[str, Any]:
        """Why it was routed as it was, and every transition."""
        own(service.get(request_id), caller)
        return service.explain(request_id)

    @router.get("/requests/{request_id}/events", response_class=StreamingResponse)
    async def events(request_id: str, request: Request, service: Svc, caller: read) -> StreamingResponse:
        """Server-sent events: every transition and step until the request has ended."""
        from orchestrator.events import follow

        own(await run_in_threadpool(service.get, request_id), caller)
        return StreamingResponse(follow(service, request_id, request.is_disconnected), media_type="text/event-stream")

    @router.post("/requests/{request_id}/cancel")
    def cancel(request_id: str, service: Svc, caller: submit) -> RequestRecord:
        """Cancel: at once, or at the next step where it is being drawn."""
        own(service.get(request_id), caller)
        return service.cancel(request_id)

    @router.post("/requests/{request_id}/retry")
    def retry(request_id: str, service: Svc, caller: admin) -> RequestRecord:
        """Start a failed request again."""
        return service.retry(request_id)

    @router.delete("/requests/{request_id}", status_code=204)
    def forget(request_id: str, service: Svc, caller: admin) -> None:
        """Forget a finished request."""
        service.purge_request(request_id)

    @router.get("/status")
    def status(request: Request, service: Svc, caller: read) -> dict[str, Any]:
        """Counts, workers, the window's figures, cache, health."""
        return {"url": str(request.base_url).rstrip("/")} | service.status()

    @router.get("/series")
    def series(
        service: Svc, caller: read, window_s: Annotated[float, Query(gt=0, le=7200)] = 600.0
    ) -> list[dict[str, float]]:
        """The load windows, bucket by bucket."""
        bucket_s = service.ledger.control().bucket_s or service.settings.controller.bucket_s
        return service.ledger.series(window_s=window_s, bucket_s=bucket_s, now_s=service.ledger.now_s())

    return router
