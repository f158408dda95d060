"""Frozen messages: what one process tells another, and what the ledger keeps.

All are JSON. Images and vectors never travel in Celery messages: they are referred to by URI and request id.
"""

from __future__ import annotations

import re
import unicodedata
import uuid
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

SCHEMA_VERSION = 1
MAX_PROMPT_CHARS = 4000
MAX_SIDE_PX = 4096
MAX_UNIX_S = 4_102_444_800  # the year 2100: no clock says more, and sums of latencies stay finite

CacheMode = Literal["auto", "bypass", "refresh", "no-store"]
Namespace = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,47}$")]


class State(StrEnum):
    """A request's life. The allowed moves are ``ledger_states.MOVES``."""

    ACCEPTED = "accepted"
    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"


FINAL = frozenset({State.DONE, State.FAILED, State.CANCELLED, State.REFUSED})


class Route(StrEnum):
    """Which queue serves a request."""

    LARGE_GEN = "large-gen"
    SMALL_REFINE = "small-refine"
    STORED = "stored"  # an exact repeat with the same seed: the stored image is the answer


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def parse_size(text: str) -> tuple[int, int]:
    """``"640x480"`` to (width, height) in pixels. Raises ValueError that names the limit."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise ValueError("size must look like 512x512")
    width, height = int(match[1]), int(match[2])
    if not (16 <= width <= MAX_SIDE_PX and 16 <= height <= MAX_SIDE_PX):
        raise ValueError(f"each side must be 16 to {MAX_SIDE_PX} pixels")
    if width % 8 or height % 8:
        raise ValueError("each side must be a multiple of 8 pixels")
    return width, height


class SubmitRequest(Message):
    """What a client asks for. ``size`` None = the large model's own size; ``seed`` None = derived from the id."""

    prompt: str
    negative_prompt: str = Field("", max_length=MAX_PROMPT_CHARS)
    seed: int | None = Field(None, ge=0, lt=2**63)
    size: str | None = None
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=50)
    cache: CacheMode = "auto"
    client: str = Field("", max_length=128)
    namespace: Namespace = "default"
    policy: str | None = Field(None, max_length=32)
    features: str | None = Field(None, max_length=200, description="modm-plus mechanisms for this request")
    min_similarity: float | None = Field(None, ge=0, le=1)
    deadline_s: float | None = Field(None, gt=0, le=86_400, description="SLO, seconds from the intended arrival")
    arrival_s: float | None = Field(
        None, ge=0, le=MAX_UNIX_S, allow_inf_nan=False, description="Intended arrival, Unix seconds; None = now"
    )
    idempotency_key: str | None = Field(None, max_length=200)
    warm_up: bool = False

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty")
        if len(value) > MAX_PROMPT_CHARS:
            raise ValueError(f"has {len(value)} characters; the limit is {MAX_PROMPT_CHARS}")
        if not value.isprintable() and any(
            unicodedata.category(c) in {"Cc", "Cs"} and c not in "\n\t\r" for c in value
        ):
            raise ValueError("must be text without control characters")
        return value

    @field_validator("size")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value


class Decision(Message):
    """What the router decided, and why. ``similarity`` is text-to-image cosine, clamped at 0."""

    route: Route
    policy: str
    skipped_steps: int = 0
    source_id: str | None = None
    source_uri: str | None = None
    source_depth: int = 0
    similarity: float | None = None
    predicted_similarity: float | None = None
    waits_on: str | None = None
    verify_floor: float | None = Field(
        None, description="CLIP score below which the refined image is drawn again; None = it is not verified."
    )
    reason: str = ""


class Completion(Message):
    """What a worker reports of a finished image. ``vector`` is base64 of little-endian float32, unit length."""

    uri: str
    width: int
    height: int
    seed: int
    model: str
    steps_run: int
    skipped_steps: int
    depth: int
    gpu_s: float
    load_s: float = 0.0
    vector: str
    embedder: str
    bytes: int = 0
    escalated: bool = False
    clip_score: float | None = None
    first_clip_score: float | None = Field(None, description="Of the refined image, when it was escalated.")


class RequestRecord(Message):
    """Everything the ledger knows of a request. Times are Unix seconds of the Redis clock; None = not yet."""

    schema_version: int = SCHEMA_VERSION
    id: str
    state: State
    request: SubmitRequest
    decision: Decision | None = None
    completion: Completion | None = None
    attempt: int = 0
    worker: str | None = None
    error: str | None = None
    rank: float = 0.0
    arrival_s: float = 0.0
    accepted_s: float = 0.0
    queued_s: float | None = None
    claimed_s: float | None = None
    done_s: float | None = None
    admitted_s: float | None = None
    step: int = 0
    clip_score: float | None = None

    @property
    def latency_s(self) -> float | None:
        """From the intended arrival to the end, so that a late submit does not hide waiting."""
        return None if self.done_s is None else self.done_s - self.arrival_s

    @property
    def queue_wait_s(self) -> float | None:
        return None if self.claimed_s is None else self.claimed_s - self.arrival_s


class WorkerStatus(Message):
    """What a worker's GPU child says of itself, kept in Redis with a time to live. Its presence means ready."""

    worker: str
    gpu: str
    host: str
    pid: int
    device: str
    models: tuple[str, ...]
    large_model: str
    small_model: str
    embedder: str
    busy_with: str | None = None
    role: str | None = None
    unwell: str | None = None
    started_s: float
    rss_mib: float = 0.0
    swap_s: dict[str, float] = Field(default_factory=dict, description="Measured price of making a model resident")
    device_name: str = Field("", description="Workers of one name are taken to be equally fast")
    profile_step_s: dict[str, float] = Field(
        default_factory=dict, description="Seconds per step by model, of `modm profile --save` on the worker's machine"
    )


def new_request_id() -> str:
    return str(uuid.uuid4())


def seed_of(request_id: str, seed: int | None) -> int:
    """The seed used: the user's, or one derived from the id, so that every attempt draws the same image."""
    return seed if seed is not None else uuid.UUID(request_id).int % (2**31)
