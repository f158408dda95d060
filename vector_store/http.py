"""The cache over HTTP: what `modm cache ...` talks to. The orchestrator mounts this router at ``/v1/cache``.

Long work comes in short calls: an import in batches of at most 32 files, a reindex in steps; exports and snapshots are
streams. Who may call what is the orchestrator's business: it gives the guards (`Guards`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, Query, Response, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from modm_tasks.errors import InvalidInputError, NotFoundError, SourceImageError
from modm_tasks.image_store import decode_image
from modm_tasks.messages import MAX_PROMPT_CHARS, Namespace
from vector_store import admin, archive
from vector_store.cache import ImageCache
from vector_store.embedder import Embedder
from vector_store.entries import ImageEntry
from vector_store.folder import BATCH, MAX_FILE_BYTES, Item, check_prompt, item_of
from vector_store.importer import import_batch, known_ids
from vector_store.progress import ImportReport
from vector_store.reindex import Reindexer

Ids = Callable[[Sequence[str]], set[str]]
Space = Annotated[Namespace, Query(description="Namespace of the cache.")]
MaybeSpace = Annotated[Namespace | None, Query(description="Namespace; all where none is given.")]
TAR: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-tar": {}}}}


def _legible(text: str) -> str:
    """Text that can be encoded; JSON may carry half of a surrogate pair."""
    if problem := check_prompt(text):
        raise ValueError(problem.removeprefix("the caption "))
    return text


Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS), AfterValidator(_legible)]
Name = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_legible)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SearchBody(Body):
    text: Prompt
    namespace: Namespace = "default"
    limit: int = Field(10, ge=1, le=100)
    size: str | None = Field(None, pattern=r"^\d{1,5}x\d{1,5}$")
    client: Name | None = None


class KnownBody(Body):
    ids: list[str] = Field(max_length=1000)
    namespace: Namespace = "default"


class EvictBody(Body):
    namespace: Namespace = "default"
    older_than_s: float | None = Field(None, ge=0)
    below: float | None = Field(None, ge=0)
    keep: int | None = Field(None, ge=0)


class ClearBody(Body):
    namespace: Namespace = "default"
    yes: bool = False


class VerifyBody(Body):
    namespace: Namespace | None = None
    repair: bool = False
    deep: bool = False


class ReindexBody(Body):
    namespace: Namespace | None = None
    batch: int = Field(64, ge=1, le=256)
    keep_old: bool = False


class PurgeBody(Body):
    namespace: Namespace | None = None
    image: str | None = Field(None, max_length=64)
    client: Name | None = None
    prompt: Prompt | None = None


async def everybody() -> None:
    """Lets in whoever calls, to see all."""


@dataclass(frozen=True, kw_only=True)
class Guards:
    """Dependencies that raise for who may not call. ``viewer`` is asked where single images are found and shown; it
    gives the only client whose images this caller may see, or None for all. ``whole`` stands before what shows the
    cache at large, ``admin`` before what changes it.
    """

    viewer: Callable[..., Awaitable[str | None]] = everybody
    whole: Callable[..., Awaitable[Any]] = everybody
    admin: Callable[..., Awaitable[Any]] = everybody


def build_router(
    get_cache: Callable[[], ImageCache],
    get_embedder: Callable[[], Embedder],
    *,
    guards: Guards | None = None,
    in_use: Ids | None = None,
    referenced: Ids | None = None,
    on_purge: Callable[[Sequence[str]], None] | None = None,
) -> APIRouter:
    """All routes, without a prefix.

    ``in_use`` says which of some ids an open request refines from (they are not evicted); ``referenced`` which of some
    request ids the ledger still needs the image of (their files are not taken for left-overs); ``on_purge`` is told the
    ids that a purge removed, to forget their prompts elsewhere.
    """
    guards = guards or Guards()
    viewing, whole = APIRouter(), APIRouter(dependencies=[Depends(guards.whole)])
    changing = APIRouter(dependencies=[Depends(guards.admin)])
    _viewing(viewing, get_cache, get_embedder, guards.viewer)
    _whole(whole, get_cache)
    _filling(changing, get_cache, get_embedder)
    _tending(changing, get_cache, in_use, referenced, on_purge)
    router = APIRouter(tags=["cache"])
    for part in (viewing, whole, changing):
        router.include_router(part)
    return router


def _viewing(
    router: APIRouter,
    get_cache: Callable[[], ImageCache],
    get_embedder: Callable[[], Embedder],
    viewer: Callable[..., Awaitable[str | None]],
) -> None:
    """Single images: another client's are not there for a caller who sees its own alone."""
    only_client = Depends(viewer)

    @router.get("/entries")
    def entries(
        namespace: Space = "default",
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        before_seq: Annotated[int | None, Query(ge=-(2**62), le=2**62)] = None,
        client: Annotated[str | None, Query(max_length=128)] = None,
        only: str | None = only_client,
    ) -> dict[str, Any]:
        """The newest images; ``next`` is the ``before_seq`` of the next page."""
        client = client if only is None else only
        found = admin.list_entries(get_cache(), namespace, limit=limit, before_seq=before_seq, client=client)
        return {
            "entries": [e.as_json() for e in found],
            "next": found[-1].seq if len(found) == limit else None,
        }

    @router.get("/entries/{image_id}")
    def entry(image_id: str, namespace: Space = "default", only: str | None = only_client) -> dict[str, Any]:
        """One image's record."""
        return _entry(get_cache(), image_id, namespace, only).as_json()

    @router.get("/entries/{image_id}/image", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    def image(image_id: str, namespace: Space = "default", only: str | None = only_client) -> Response:
        """The image itself."""
        cache = get_cache()
        found = _entry(cache, image_id, namespace, only)
        return Response(cache.images.read_bytes(found.uri), media_type="image/png")

    @router.post("/search")
    def search(body: SearchBody, only: str | None = only_client) -> dict[str, Any]:
        """The images nearest to a text."""
        vector = get_embedder().embed_texts([body.text])[0]
        client = body.client if only is None else only
        found = get_cache().search(vector, namespace=body.namespace, limit=body.limit, size=body.size, client=client)
        return {"matches": [m.entry.as_json() for m in found]}

    @router.post("/search/image")
    def search_image(
        file: Annotated[UploadFile, File()],
        namespace: Annotated[Namespace, Form()] = "default",
        limit: Annotated[int, Form(ge=1, le=100)] = 10,
        only: str | None = only_client,
    ) -> dict[str, Any]:
        """The images nearest to an image."""
        try:
            image = decode_image(_read(file), what="file")
        except SourceImageError as error:
            raise InvalidInputError(str(error), field="file") from error
        vector = get_embedder().embed_images([image])[0]
        found = get_cache().search(vector, namespace=namespace, limit=limit, client=only)
        return {"matches": [m.entry.as_json() for m in found]}


def _whole(router: APIRouter, get_cache: Callable[[], ImageCache]) -> None:
    @router.get("/stats")
    def stats(namespace: MaybeSpace = None) -> dict[str, Any]:
        """Size, capacity, uses by steps skipped, age of hits, disk, depth."""
        return admin.stats(get_cache(), namespace)

    @router.get("/export", response_class=StreamingResponse, responses=TAR)
    def export(namespace: Space = "default") -> StreamingResponse:
        """A tar of PNG files and captions.jsonl, as import takes them."""
        return StreamingResponse(archive.export_stream(get_cache(), namespace), media_type="application/x-tar")

    @router.get("/snapshot", response_class=StreamingResponse, responses=TAR)
    def snapshot(namespace: MaybeSpace = None) -> StreamingResponse:
        """Vectors, records and images of the cache as one checksummed tar."""
        names = None if namespace is None else [namespace]
        return StreamingResponse(archive.snapshot_stream(get_cache(), names), media_type="application/x-tar")


def _filling(router: APIRouter, get_cache: Callable[[], ImageCache], get_embedder: Callable[[], Embedder]) -> None:
    @router.post("/known")
    def known(body: KnownBody) -> dict[str, Any]:
        """Which of some import ids are in the cache already, so that a resumed import uploads only the rest."""
        return {"known": sorted(known_ids(get_cache(), body.namespace, [_uuid(i) for i in body.ids]))}

    @router.post("/import")
    def import_(
        files: Annotated[list[UploadFile], File(description="Image files, at most 32.")],
        captions: Annotated[str, Form(description="JSON list, one {file, prompt, seed?, model?} per file, in order.")],
        namespace: Annotated[Namespace, Form()] = "default",
    ) -> dict[str, Any]:
        """Add images. What is unreadable is listed; the rest goes in."""
        items = _captions(captions)
        if not 0 < len(files) <= BATCH or len(files) != len(items):
            raise InvalidInputError(
                f"{len(files)} files with {len(items)} captions; send 1 to {BATCH}, one caption each", field="files"
            )
        pairs = [(item, _read(file)) for item, file in zip(items, files, strict=True)]
        report: ImportReport = import_batch(get_cache(), get_embedder(), pairs, namespace=namespace, now_s=time.time())
        get_cache().evict(namespace)
        return report.as_json()

    @router.post("/restore")
    def restore(file: Annotated[UploadFile, File()], replace: Annotated[bool, Form()] = False) -> dict[str, Any]:
        """Read a snapshot back; it is checked as a whole before anything changes."""
        return {"restored": archive.restore(get_cache(), file.file, replace=replace)}

    reindexers: dict[int, Reindexer] = {}

    @router.post("/reindex")
    def reindex(body: ReindexBody) -> dict[str, Any]:
        """One step of embedding another embedder's images anew; call it until every state is finished."""
        cache, embedder = get_cache(), get_embedder()
        worker = reindexers.setdefault(id(cache), Reindexer(cache, embedder))
        names = worker.namespaces() if body.namespace is None else [body.namespace]
        for name in names:
            state = worker.step(name, batch=body.batch, keep_old=body.keep_old)
            if not state.finished or name == names[-1]:
                return {"state": state.as_json(), "left": names[names.index(name) + 1 :]}
        return {"state": None, "left": []}


def _tending(
    router: APIRouter,
    get_cache: Callable[[], ImageCache],
    in_use: Ids | None,
    referenced: Ids | None,
    on_purge: Callable[[Sequence[str]], None] | None,
) -> None:
    @router.post("/evict")
    def evict(body: EvictBody) -> dict[str, Any]:
        """Evict by age, by utility, or all but some. Images in use stay."""
        gone = admin.evict(
            get_cache(),
            body.namespace,
            older_than_s=body.older_than_s,
            below=body.below,
            keep=body.keep,
            now_s=time.time(),
            in_use=in_use,
        )
        return {"evicted": len(gone), "ids": gone[:1000]}

    @router.post("/clear")
    def clear(body: ClearBody) -> dict[str, Any]:
        """Delete a namespace with its files."""
        if not body.yes:
            raise InvalidInputError("clearing deletes every image of the namespace; say yes", field="yes")
        return {"cleared": get_cache().clear(body.namespace)}

    @router.post("/verify")
    def verify(body: VerifyBody) -> dict[str, Any]:
        """Compare vectors with files, and mend if asked."""
        report = admin.verify(
            get_cache(),
            body.namespace,
            repair=body.repair,
            deep=body.deep,
            now_s=time.time(),
            referenced=referenced,
        )
        return report.as_json()

    @router.post("/purge")
    def purge(body: PurgeBody) -> dict[str, Any]:
        """Delete an image, a client's or a prompt's images, and everything refined from them."""
        image = None if body.image is None else _uuid(body.image)
        gone = admin.purge(get_cache(), body.namespace, image=image, client=body.client, prompt=body.prompt)
        if on_purge is not None and gone:
            on_purge(gone)
        return {"purged": len(gone), "ids": gone}


def _entry(cache: ImageCache, image_id: str, namespace: str, only: str | None) -> ImageEntry:
    found = cache.get(_uuid(image_id), namespace)
    if found is None or only not in {None, found.client}:
        raise NotFoundError(f"no image {image_id} in namespace {namespace}", field="image_id")
    return found


def _uuid(text: str) -> str:
    import uuid

    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise InvalidInputError(f"{text[:64]!r} is not a UUID", field="id") from None


def _read(file: UploadFile) -> bytes:
    data = file.file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidInputError(f"file is larger than {MAX_FILE_BYTES // 2**20} MiB", field="file")
    return data


def _captions(text: str) -> list[Item]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidInputError("captions is not JSON", field="captions") from None
    if not isinstance(rows, list):
        raise InvalidInputError("captions is not a JSON list", field="captions")
    return [item_of(row) for row in rows]
