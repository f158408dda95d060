"""Where a replay sends its requests: a running orchestrator over HTTP, or a service in this process (`--direct`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modm_tasks.client import Client
from modm_tasks.messages import RequestRecord, SubmitRequest
from modm_tasks.settings import Settings

if TYPE_CHECKING:
    from orchestrator.service import Service
    from vector_store.progress import ImportReport

Say = Callable[[str], None]


def open_target(settings: Settings, stack: ExitStack, *, direct: bool) -> HttpTarget | DirectTarget:
    """The target, closed with ``stack``. Raises UnavailableError where nothing runs, or where the embedded store is held
    by a running orchestrator (``--direct``)."""
    if not direct:
        return HttpTarget(stack.enter_context(Client.from_settings(settings)))
    from orchestrator.build import build_service

    service = build_service(settings)
    stack.callback(service.stop)
    service.start()
    return DirectTarget(service)


class HttpTarget:
    """A running orchestrator."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def submit(self, request: SubmitRequest) -> RequestRecord:
        body = request.model_dump(mode="json", exclude={"idempotency_key"}, exclude_defaults=True)
        headers = {"Idempotency-Key": request.idempotency_key} if request.idempotency_key else None
        return RequestRecord.model_validate(self.client.post("/v1/requests", json=body, headers=headers))

    def submit_many(self, requests: Sequence[SubmitRequest]) -> list[RequestRecord]:
        rows = [r.model_dump(mode="json", exclude_defaults=True) for r in requests]
        answer = self.client.post("/v1/requests/batch", json={"requests": rows})
        return [RequestRecord.model_validate(row) for row in answer]

    def wait(self, request_id: str, timeout_s: float, *, admitted: bool = False) -> RequestRecord:
        answer = self.client.get(f"/v1/requests/{request_id}", wait_s=min(timeout_s, 60.0), admitted=admitted)
        return RequestRecord.model_validate(answer)

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.get("/v1/status")
        return answer

    def role_moves(self, since_s: float) -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = self.client.get("/v1/role_moves", since_s=since_s)
        return answer

    def set_control(self, **changes: Any) -> None:
        self.client.put("/v1/control", json=changes)

    def import_images(self, folder: Path, namespace: str, say: Say) -> None:
        from vector_store.remote import import_over_http

        _say(import_over_http(self.client, folder, namespace=namespace), say)

    def image(self, request_id: str, destination: Path, *, source: bool = False) -> None:
        self.client.download(f"/v1/requests/{request_id}/{'source' if source else 'image'}", destination)


class DirectTarget:
    """A service in this process; it must have been started."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def submit(self, request: SubmitRequest) -> RequestRecord:
        return self.service.submit(request)

    def submit_many(self, requests: Sequence[SubmitRequest]) -> list[RequestRecord]:
        return self.service.submit_many(requests)

    def wait(self, request_id: str, timeout_s: float, *, admitted: bool = False) -> RequestRecord:
        return self.service.wait(request_id, timeout_s, admitted=admitted)

    def status(self) -> dict[str, Any]:
        return self.service.status()

    def role_moves(self, since_s: float) -> list[dict[str, Any]]:
        return [m.model_dump() for m in self.service.ledger.role_moves(since_s=since_s)]

    def set_control(self, **changes: Any) -> None:
        self.service.ledger.set_control(**changes)

    def import_images(self, folder: Path, namespace: str, say: Say) -> None:
        from vector_store.importer import import_folder

        _say(import_folder(self.service.parts.cache, self.service.parts.embedder, folder, namespace=namespace), say)

    def image(self, request_id: str, destination: Path, *, source: bool = False) -> None:
        record = self.service.get(request_id)
        uri = record.decision.source_uri if source and record.decision else self.service.image_uri(request_id)
        destination.write_bytes(self.service.parts.images.read_bytes(uri or ""))


def _say(report: ImportReport, say: Say) -> None:
    say(f"imported {report.imported} images, {report.skipped} were there already")
    for problem in report.problems[:10]:
        say(f"not imported: {problem.file}: {problem.reason}")
