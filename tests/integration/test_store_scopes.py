"""Who sees what of the cache over HTTP: two clients and an administrator with keys, shared or not, on both backends."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from modm_tasks.image_store import ImageStore, path_for, to_png
from modm_tasks.settings import Settings
from orchestrator.auth import Gate, KeyFile, Scope
from orchestrator.compose import cache_guards
from orchestrator.replies import add_error_handlers
from vector_store.backends import open_backend
from vector_store.cache import ImageCache
from vector_store.embedder import HashEmbedder
from vector_store.entries import ImageEntry
from vector_store.http import build_router

EMBEDDER = HashEmbedder()
PROMPT = "a red cat on a blue sofa"
KEYS: dict[str, tuple[Scope, ...]] = {
    "ann": ("submit", "read"),
    "bob": ("submit", "read"),
    "root": ("admin",),
    "eve": ("submit",),
}


def picture(prompt: str) -> bytes:
    image = Image.new("RGB", (16, 16), (90, 80, 80))
    image.info["modm:prompt"] = prompt
    return to_png(image)


class Site:
    """The cache's routes behind the orchestrator's own guards. ``ids`` are the images of each client."""

    def __init__(self, cache: ImageCache, keys: Path, *, shared: bool) -> None:
        file = KeyFile(keys)
        self.secrets = {client: file.add(client, scopes) for client, scopes in KEYS.items()}
        self.ids: dict[str, list[str]] = {}
        for number, client in enumerate(["ann", "bob", "ann", ""]):
            entry_id = str(uuid.UUID(int=number + 1))
            uri = path_for(entry_id, 1)
            cache.images.write_atomic(uri, picture(PROMPT))
            entry = ImageEntry(
                id=entry_id, prompt=PROMPT, model="m", seed=1, size="16x16", depth=0, created_s=1.0, uri=uri, client=client
            )  # fmt: skip
            cache.add(entry, EMBEDDER.embed_texts([PROMPT])[0])
            self.ids.setdefault(client, []).append(entry_id)
        app = FastAPI()
        guards = cache_guards(Gate(file), shared=shared)
        app.include_router(build_router(lambda: cache, lambda: EMBEDDER, guards=guards), prefix="/v1/cache")
        add_error_handlers(app)
        self.http = TestClient(app)

    def call(self, client: str, method: str, path: str, **more: Any) -> Any:
        headers = {"authorization": f"Bearer {self.secrets[client]}"}
        answer: Any = self.http.request(method, f"/v1/cache{path}", headers=headers, **more)
        return answer

    def seen(self, client: str) -> list[set[str]]:
        """Ids by each way to see some: the list, another's list, the search by text and by image."""
        listed = [self.call(client, "GET", "/entries", params=p) for p in ({}, {"client": "bob"})]
        text = {"text": PROMPT, "limit": 50}
        found = [self.call(client, "POST", "/search", json=body) for body in (text, text | {"client": "bob"})]
        form = {"files": {"file": ("a.png", picture(PROMPT))}, "data": {"limit": "50"}}
        found.append(self.call(client, "POST", "/search/image", **form))
        assert {a.status_code for a in (*listed, *found)} == {200}
        return [{e["id"] for e in a.json()["entries"]} for a in listed] + [
            {e["id"] for e in a.json()["matches"]} for a in found
        ]

    def single(self, client: str, whose: str) -> set[int]:
        paths = [f"/entries/{i}{end}" for i in self.ids[whose] for end in ("", "/image")]
        return {self.call(client, "GET", path).status_code for path in paths}


@pytest.fixture(params=["edge:", "memory:"])
def make_site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[bool], Site]]:
    settings = Settings(home=tmp_path / "home", qdrant_url=request.param)
    images = ImageStore(settings.image_root)
    cache = ImageCache(open_backend(settings), EMBEDDER.identity, EMBEDDER.dim, settings, images)
    yield lambda shared: Site(cache, tmp_path / "keys.json", shared=shared)
    cache.close()


def test_clients_that_do_not_share_find_their_own_images_only(make_site: Callable[[bool], Site]) -> None:
    site = make_site(False)
    for client in ("ann", "bob"):
        assert site.seen(client) == [set(site.ids[client])] * 5
        other = "bob" if client == "ann" else "ann"
        assert (site.single(client, client), site.single(client, other), site.single(client, "")) == (
            {200},
            {404},
            {404},
        )
    everything = {i for ids in site.ids.values() for i in ids}
    bobs = set(site.ids["bob"])
    assert site.seen("root") == [everything, bobs, everything, bobs, everything]
    assert site.single("root", "ann") == {200}


def test_clients_that_share_find_every_image(make_site: Callable[[bool], Site]) -> None:
    site = make_site(True)
    everything, bobs = {i for ids in site.ids.values() for i in ids}, set(site.ids["bob"])
    assert site.seen("ann") == [everything, bobs, everything, bobs, everything]
    assert site.single("bob", "ann") == {200}


@pytest.mark.parametrize("shared", [True, False])
def test_the_whole_is_shown_where_it_is_shared_and_changed_by_administrators(
    make_site: Callable[[bool], Site], shared: bool
) -> None:
    site = make_site(shared)
    for path in ("/stats", "/export", "/snapshot"):
        assert (site.call("ann", "GET", path).status_code == 200) is shared
        assert site.call("root", "GET", path).status_code == 200
    for path in ("/known", "/import", "/restore", "/reindex", "/evict", "/clear", "/verify", "/purge"):
        assert site.call("ann", "POST", path, json={}).status_code == 401
    for path in ("/entries", "/stats", f"/entries/{site.ids['ann'][0]}"):
        assert site.call("eve", "GET", path).status_code == 401  # may submit, not read
        assert site.http.get(f"/v1/cache{path}").status_code == 401  # no key
    assert site.call("root", "POST", "/purge", json={"client": "ann"}).json()["purged"] == 2
