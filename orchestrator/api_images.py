"""`POST /v1/images/generations` in OpenAI's form, so that existing clients work unchanged.

A synchronous call over the same service: each of the ``n`` images is a request of its own, visible everywhere else.
Fields that OpenAI has and MoDM cannot honour (background, moderation, style) are accepted and ignored; seed, steps,
guidance and negative prompt come as extra body fields.
"""

# Annotations are evaluated here, not postponed: FastAPI must see dependencies that are made inside functions.
import base64
import contextlib
import io
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from modm_tasks.errors import ConflictError, EngineError, InvalidInputError, ModmError, UnavailableError
from modm_tasks.messages import FINAL, CacheMode, RequestRecord, State, SubmitRequest
from orchestrator.auth import Caller, Gate
from orchestrator.service import Service

#: Longest a synchronous call is held; the request itself goes on, and its id is in the error.
HOLD_S = 600.0


class ImagesRequest(BaseModel):
    """OpenAI's fields, then ours."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    model: str | None = Field(None, max_length=200)
    n: int | None = Field(1, ge=1, le=10)
    size: str | None = "auto"
    quality: str | None = Field("auto", max_length=20)
    response_format: Literal["url", "b64_json"] | None = "url"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(100, ge=0, le=100)
    background: str | None = Field(None, max_length=20)
    moderation: str | None = Field(None, max_length=20)
    style: str | None = Field(None, max_length=20)
    user: str | None = Field(None, max_length=128)
    negative_prompt: str = ""
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    cache: CacheMode = "auto"


class ImageOut(BaseModel):
    url: str | None = None
    b64_json: str | None = None
    id: str


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageOut]
    output_format: str = "png"
    size: str | None = None


def encode(png: bytes, output_format: str, quality: int) -> bytes:
    """PNG bytes in the format asked for."""
    if output_format == "png":
        return png
    from PIL import Image

    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").save(out, format=output_format.upper(), quality=max(1, quality))
    return out.getvalue()


def _submission(body: ImagesRequest, index: int, caller: Caller) -> SubmitRequest:
    fields: dict[str, Any] = body.model_dump(
        include={"prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "cache"}
    )
    fields["size"] = None if body.size in (None, "auto") else body.size
    fields["seed"] = None if body.seed is None else body.seed + index
    fields["client"] = caller.client or body.user or ""
    try:
        return SubmitRequest(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidInputError(f"{field}: {str(first['msg']).removeprefix('Value error, ')}", field=field) from error


def router(gate: Gate) -> APIRouter:
    routes = APIRouter(prefix="/v1/images", tags=["openai"])

    @routes.post("/generations")
    async def generations(
        body: ImagesRequest, request: Request, caller: Annotated[Caller, Depends(gate.require("submit"))]
    ) -> ImagesResponse:
        """Draw ``n`` images and answer when they are done."""
        service: Service = request.app.state.service
        count = body.n or 1
        gate.admit(caller, count)
        submissions = [_submission(body, i, caller) for i in range(count)]
        accepted = await run_in_threadpool(service.submit_many, submissions)
        finished = [await _held(service, request, r.id) for r in accepted]
        for record in finished:
            _check(record)
        form, quality = body.output_format or "png", body.output_compression or 100
        data = []
        for record in finished:
            url = f"{str(request.base_url).rstrip('/')}/v1/requests/{record.id}/image"
            if body.response_format == "b64_json":
                picture = await run_in_threadpool(_picture, service, record.id, form, quality)
                data.append(ImageOut(b64_json=picture, id=record.id))
            else:
                data.append(ImageOut(url=url, id=record.id))
        done = finished[0].completion
        size = f"{done.width}x{done.height}" if done else None
        return ImagesResponse(created=int(time.time()), data=data, output_format=form, size=size)

    return routes


def _picture(service: Service, request_id: str, form: str, quality: int) -> str:
    png = service.parts.images.read_bytes(service.image_uri(request_id))
    return base64.b64encode(encode(png, form, quality)).decode()


async def _held(service: Service, request: Request, request_id: str) -> RequestRecord:
    """Wait for the end. A client that hangs up leaves its request to go on, or has it cancelled (``on_disconnect``)."""
    until = time.monotonic() + HOLD_S
    while True:
        record = await run_in_threadpool(service.wait, request_id, min(1.0, max(0.0, until - time.monotonic())))
        if record.state in FINAL or time.monotonic() >= until:
            return record
        if service.settings.api.on_disconnect == "cancel" and await request.is_disconnected():
            with contextlib.suppress(ConflictError):
                await run_in_threadpool(service.cancel, request_id)


def _check(record: RequestRecord) -> None:
    if record.state is State.DONE:
        return
    if record.state in {State.FAILED, State.CANCELLED, State.REFUSED}:
        error: ModmError = EngineError(f"request {record.id} {record.state.value}: {record.error or 'no reason noted'}")
    else:
        error = UnavailableError(f"request {record.id} is still {record.state.value}; ask for it later")
    raise error
