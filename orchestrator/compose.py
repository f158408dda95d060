"""The served application: service, cache routes, controller routes, metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Response

from modm_tasks.settings import Settings
from orchestrator.api import build_app
from orchestrator.auth import Gate
from orchestrator.build import build_service
from orchestrator.metrics import Observer
from orchestrator.service import Service

if TYPE_CHECKING:
    from vector_store.http import Guards


def make_app(settings: Settings, gate: Gate) -> FastAPI:
    """Everything that one orchestrator serves. The vector store is opened when the application starts."""
    observer = Observer()

    def make_service() -> Service:
        return build_service(settings, observer=observer, apart=True)

    def routers(service: Service) -> list[APIRouter]:
        return [*folder_routers(service, gate), metrics_router(service, observer)]

    return build_app(make_service, gate, routers=routers)


def folder_routers(service: Service, gate: Gate) -> list[APIRouter]:
    """Routes that belong to other folders: cache administration, workers and controller. Only administrators write."""
    from orchestrator.controller.http import build_router as controller_router
    from vector_store.http import build_router as cache_router

    cache = APIRouter()
    controller = APIRouter(dependencies=[Depends(gate.by_method(read="read", write="admin"))])
    cache.include_router(
        cache_router(
            lambda: service.parts.cache,
            lambda: service.parts.embedder,
            guards=cache_guards(gate, shared=service.settings.cache.scope == "shared"),
            in_use=service.ledger.in_use,
            referenced=service.ledger.known,
            on_purge=service.forget_finished,
        ),
        prefix="/v1/cache",
    )
    controller.include_router(controller_router(lambda: service.ledger))
    return [cache, controller]


def cache_guards(gate: Gate, *, shared: bool) -> Guards:
    """Where clients share the cache a key with ``read`` looks at all of it. Where they do not, it finds its own images
    only, and what tells of the others' (statistics, export, snapshot) is an administrator's."""
    from vector_store.http import Guards

    async def viewer(authorization: Annotated[str | None, Header()] = None) -> str | None:
        caller = gate.check(authorization, "read")
        return None if shared or caller.admin else caller.client

    return Guards(viewer=viewer, whole=gate.require("read" if shared else "admin"), admin=gate.require("admin"))


def metrics_router(service: Service, observer: Observer) -> APIRouter:
    """Prometheus text. Read at scrape, so an idle orchestrator costs nothing."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    from orchestrator.metrics import build_registry

    registry = build_registry(service.ledger, service.parts.cache, service.settings, observer)
    router = APIRouter(tags=["health"])
    render: Callable[[], bytes] = lambda: generate_latest(registry)  # noqa: E731

    @router.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Prometheus metrics; holds no prompts and needs no key."""
        return Response(render(), media_type=CONTENT_TYPE_LATEST)

    return router
