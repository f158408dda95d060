"""The HTTP API: the service by FastAPI. OpenAPI is at /docs and /openapi.json. Refusals: `replies`; one submit: `submit`."""

# Annotations are evaluated here, not postponed: FastAPI must see dependencies that are made inside functions.
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from modm_tasks import __version__
from modm_tasks.errors import NotFoundError
from modm_tasks.messages import RequestRecord, State, SubmitRequest
from orchestrator import submit
from orchestrator.auth import Caller, Gate
from orchestrator.replies import add_error_handlers
from orchestrator.service import Service

MAX_BATCH = 256
MAX_WAIT_S = 300.0
PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}}
#: What the framework cannot see of a route that reads its request itself.
ONE_REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/SubmitRequest"}}},
    },
    "parameters": [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}}
        for name in ("idempotency-key", "authorization")
    ],
}


class Batch(BaseModel):
    """Several requests in one call."""

    model_config = ConfigDict(extra="forbid")
    requests: list[SubmitRequest] = Field(min_length=1, max_length=MAX_BATCH)


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


def request_routes(gate: Gate) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["requests"])
    submitter = Annotated[Caller, Depends(gate.require("submit"))]
    read = Annotated[Caller, Depends(gate.require("read"))]
    admin = Annotated[Caller, Depends(gate.require("admin"))]

    @router.post("/requests", status_code=202, response_model=RequestRecord, openapi_extra=ONE_REQUEST)
    async def submit_one(request: Request, service: Svc) -> Response:
        """Accept one prompt. Durable when this answers."""
        return await submit.answer(request, service, gate)

    @router.post("/requests/batch", status_code=202)
    def submit_batch(body: Batch, service: Svc, caller: submitter) -> list[RequestRecord]:
        """Accept several prompts, in order."""
        gate.admit(caller, len(body.requests))
        return service.submit_many([submit.as_caller(r, caller) for r in body.requests])

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
    def cancel(request_id: str, service: Svc, caller: submitter) -> RequestRecord:
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
