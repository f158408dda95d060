"""The served application: service, cache routes, controller routes, metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Response

from modm_tasks.settings import Settings
from orchestrator.api import build_app
from orchestrator.auth import Gate
from orchestrator.build import build_service
from orchestrator.metrics import Observer
from orchestrator.service import Service


def make_app(settings: Settings, gate: Gate) -> FastAPI:
    """Everything that one orchestrator serves. The vector store is opened when the application starts."""
    observer = Observer()

    def make_service() -> Service:
        return build_service(settings, observer=observer)

    def routers(service: Service) -> list[APIRouter]:
        return [*folder_routers(service, gate), metrics_router(service, observer)]

    return build_app(make_service, gate, routers=routers)


def folder_routers(service: Service, gate: Gate) -> list[APIRouter]:
    """Routes that belong to other folders: cache administration, workers and controller. Only administrators write.

    The cache's routes show prompts and images of all clients, so where clients do not share the cache they are an
    administrator's altogether.
    """
    from orchestrator.controller.http import build_router as controller_router
    from vector_store.http import build_router as cache_router

    guard: list[Any] = [Depends(gate.by_method(read="read", write="admin"))]
    shared = service.settings.cache.scope == "shared"
    cache = APIRouter(dependencies=guard if shared else [Depends(gate.require("admin"))])
    controller = APIRouter(dependencies=guard)
    cache.include_router(
        cache_router(
            lambda: service.parts.cache,
            lambda: service.parts.embedder,
            in_use=service.ledger.in_use,
            referenced=service.ledger.known,
            on_purge=service.forget_finished,
        ),
        prefix="/v1/cache",
    )
    controller.include_router(controller_router(lambda: service.ledger))
    return [cache, controller]


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
