"""The image cache over both backends: search, sequence, eviction with files, provenance."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modm_tasks.errors import InvalidInputError
from modm_tasks.image_store import ImageStore
from modm_tasks.settings import CacheSettings, Settings
from tests.support.cache import use
from vector_store.backends import open_backend
from vector_store.cache import ImageCache
from vector_store.embedder import HashEmbedder
from vector_store.entries import ImageEntry

EMBEDDER = HashEmbedder()
MakeCache = Callable[..., ImageCache]


def uid(n: int) -> str:
    return str(uuid.UUID(int=n + 1))


@pytest.fixture(params=["edge:", "memory:"])
def make_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeCache]:
    opened: list[ImageCache] = []

    def make(**cache: Any) -> ImageCache:
        settings = Settings(home=tmp_path, qdrant_url=request.param, cache=CacheSettings(**cache))
        made = ImageCache(
            open_backend(settings), EMBEDDER.identity, EMBEDDER.dim, settings, ImageStore(settings.image_root)
        )
        opened.append(made)
        return made

    yield make
    for cache in opened:
        cache.close()


def put(cache: ImageCache, n: int, prompt: str = "", **fields: Any) -> ImageEntry:
    """A picture of the prompt, stored and cached."""
    prompt = prompt or f"picture number{n}"
    image = Image.new("RGB", (16, 16), (n % 256, 0, 0))
    image.info["modm:prompt"] = prompt
    uri, _ = cache.images.write(uid(n), 1, image)
    values: dict[str, Any] = {"depth": 0, "client": "", "namespace": "default"} | fields
    entry = ImageEntry(
        id=uid(n), prompt=prompt, model="large", seed=n, size="16x16", created_s=100.0 + n, uri=uri, **values
    )
    return cache.add(entry, EMBEDDER.embed_images([image])[0])


def find(cache: ImageCache, text: str, **kwargs: Any) -> list[str]:
    return [m.entry.id for m in cache.search(EMBEDDER.embed_texts([text])[0], **kwargs)]


def ids(cache: ImageCache, namespace: str = "default") -> set[str]:
    return {e.id for e in cache.iterate(namespace)}


def test_the_nearest_image_comes_with_its_record(make_cache: MakeCache) -> None:
    cache = make_cache()
    for n, prompt in enumerate(["a red cat", "a blue dog", "a green tree"]):
        put(cache, n, prompt)
    (match,) = cache.search(EMBEDDER.embed_texts(["a red cat"])[0])
    assert match.entry.id == uid(0)
    assert match.similarity == match.entry.similarity == pytest.approx(1, abs=1e-5)
    assert match.entry.prompt == "a red cat"
    opposite = -EMBEDDER.embed_texts(["a red cat"])[0]
    assert all(m.similarity >= 0 for m in cache.search(opposite, limit=3))


def test_conditions_that_leave_few_are_met_by_asking_again(make_cache: MakeCache) -> None:
    cache = make_cache()
    for n in range(40):
        put(cache, n, "a cat", depth=0 if n == 39 else 3, client="me" if n % 2 else "you")
    assert find(cache, "a cat", max_depth=2) == [uid(39)]
    assert find(cache, "a cat", max_depth=2, exclude_ids=[uid(39)]) == []
    assert set(find(cache, "a cat", client="you", limit=50)) == {uid(n) for n in range(0, 40, 2)}
    assert find(cache, "a cat", size="32x32") == []
    assert len(find(cache, "a cat", exclude_ids=[uid(n) for n in range(38)], limit=5)) == 2


def test_namespaces_do_not_meet(make_cache: MakeCache) -> None:
    cache = make_cache()
    put(cache, 1, "a cat", namespace="demo-a")
    put(cache, 2, "a cat", namespace="demo_b")
    assert cache.namespaces() == ["demo-a", "demo_b"]
    assert find(cache, "a cat", namespace="demo-a", limit=5) == [uid(1)]
    assert find(cache, "a cat", limit=5) == []
    assert cache.count() == 0
    assert cache.get(uid(1)) is None
    assert cache.get(uid(1), namespace="demo-a") is not None


def test_a_second_delivery_changes_nothing_but_the_content(make_cache: MakeCache) -> None:
    cache = make_cache()
    first = put(cache, 1)
    put(cache, 2)
    cache.touch([use(uid(1), 500.0, 30)])
    again = put(cache, 1)
    assert again.seq == first.seq == 1
    assert (again.hits, again.utility, again.hits_by_k) == (1, 30, {"30": 1})
    assert cache.count() == 2


def test_the_sequence_goes_on_after_a_restart(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for expected in (1, 2, 3):
        cache = ImageCache(
            open_backend(settings), EMBEDDER.identity, EMBEDDER.dim, settings, ImageStore(settings.image_root)
        )
        assert put(cache, expected).seq == expected
        cache.close()


def test_fifo_keeps_the_window_and_files_leave_with_vectors(make_cache: MakeCache) -> None:
    cache = make_cache(capacity=5)
    for n in range(12):
        put(cache, n)
        cache.evict("default", lambda _: set())
    assert ids(cache) == {uid(n) for n in range(7, 12)}
    assert {f.uri[3:39] for f in cache.images.list()} == ids(cache)


def test_eviction_is_batched_by_a_hundredth(make_cache: MakeCache) -> None:
    cache = make_cache(capacity=300)
    left = []
    for n in range(309):
        put(cache, n)
        left.append(len(cache.evict("default")))
    assert cache.count() <= 303
    assert sorted(set(left)) == [0, 3]


def test_images_in_use_stay_until_released(make_cache: MakeCache) -> None:
    cache = make_cache(capacity=3)
    in_use = {uid(0)}

    def busy(asked: Sequence[str]) -> set[str]:
        return in_use.intersection(asked)

    for n in range(5):
        put(cache, n)
    assert cache.evict("default", busy) == [uid(1)]
    assert cache.images.exists(cache.get(uid(0)).uri)  # type: ignore[union-attr]
    in_use.clear()
    assert cache.evict("default", busy) == [uid(0)]
    assert cache.count() == 3


@pytest.mark.parametrize(("policy", "stays"), [("lru", {0, 4}), ("utility", {0, 2})])
def test_other_policies_evict_by_use(make_cache: MakeCache, policy: str, stays: set[int]) -> None:
    cache = make_cache(capacity=2, eviction=policy)
    for n in range(5):
        put(cache, n)
    cache.touch([use(uid(0), 1000.0, 10)])
    cache.touch([use(uid(2), 102.5, 30)])
    cache.evict("default")
    assert ids(cache) == {uid(n) for n in stays}


def test_uses_are_counted(make_cache: MakeCache) -> None:
    cache = make_cache()
    put(cache, 1)
    cache.touch([use(uid(1), 111.0, 30), use(uid(9), 1.0, 5), use(uid(1), 121.0, 5)])
    cache.touch([use(uid(1), 131.0, 30)])
    entry = cache.get(uid(1))
    assert entry is not None
    assert (entry.hits, entry.utility, entry.last_used_s) == (3, 65, 131.0)
    assert entry.hits_by_k == {"30": 2, "5": 1}
    assert entry.hit_age_sum_s == 10 + 20 + 30
    assert list(cache.recent_hit_ages_s) == [10, 20, 30]


def test_ancestors_outlive_those_between(make_cache: MakeCache) -> None:
    cache = make_cache()
    put(cache, 1)
    put(cache, 2, source_id=uid(1), depth=1)
    assert put(cache, 3, source_id=uid(2), depth=2).ancestors == (uid(1), uid(2))
    cache.remove("default", [uid(2)])
    entry = cache.get(uid(3))
    assert entry is not None
    assert entry.ancestors == (uid(1), uid(2))


def test_the_cache_knows_which_files_it_holds(make_cache: MakeCache) -> None:
    cache = make_cache()
    entry = put(cache, 1, namespace="a")
    assert cache.holds_uri(entry.uri)
    assert not cache.holds_uri(entry.uri.replace("-1.png", "-2.png"))
    assert not cache.holds_uri("nonsense")


def test_vectors_come_row_for_row(make_cache: MakeCache) -> None:
    cache = make_cache()
    assert cache.vectors()[1].shape == (0, EMBEDDER.dim)
    for n in range(3):
        put(cache, n)
    names, matrix = cache.vectors()
    for name, row in zip(names, matrix, strict=True):
        entry = cache.get(name)
        assert entry is not None
        assert np.allclose(row, EMBEDDER.embed_texts([entry.prompt])[0], atol=1e-5)
    assert cache.vector_of(uid(1)) is not None
    assert cache.vector_of(uid(99)) is None


def test_clear_empties_and_the_namespace_can_be_filled_again(make_cache: MakeCache) -> None:
    cache = make_cache()
    for n in range(4):
        put(cache, n)
    assert cache.clear("default") == 4
    assert cache.clear("default") == 0
    assert list(cache.images.list()) == []
    assert put(cache, 9).seq == 1


@pytest.mark.parametrize("vector", [np.ones(3), np.full(64, np.nan)])
def test_a_wrong_vector_is_refused(make_cache: MakeCache, vector: Any) -> None:
    cache = make_cache()
    entry = put(cache, 1)
    with pytest.raises(InvalidInputError, match="64 finite numbers"):
        cache.add(entry, vector.astype(np.float32))
    with pytest.raises(InvalidInputError, match="dimension"):
        cache.search(np.ones(3, dtype=np.float32))
    with pytest.raises(InvalidInputError, match="dimension"):
        cache.search(np.ones(3, dtype=np.float32), namespace="none")


def test_threads_get_different_sequence_numbers(make_cache: MakeCache) -> None:
    cache = make_cache()
    seqs: list[int] = []

    def work(start: int) -> None:
        for n in range(start, start + 15):
            seqs.append(put(cache, n).seq)

    threads = [threading.Thread(target=work, args=(100 * t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(seqs) == list(range(1, 61))


def test_churn_does_not_grow_the_embedded_store(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, cache=CacheSettings(capacity=50))
    cache = ImageCache(open_backend(settings), EMBEDDER.identity, EMBEDDER.dim, settings, ImageStore("memory://churn"))
    vector = EMBEDDER.embed_texts(["x"])[0]
    for start in range(0, 3000, 50):
        entries = [
            ImageEntry(
                id=uid(n), prompt="x", model="m", seed=0, size="16x16", depth=0, created_s=0, uri=f"00/{uid(n)}-1.png"
            )
            for n in range(start, start + 50)
        ]
        cache.add_many([(e, vector) for e in entries])
        cache.evict("default")
    assert cache.count() == 50
    assert cache.search(vector)[0].similarity == pytest.approx(1, abs=1e-5)
    cache.close()


def test_a_growing_cache_gets_its_codes_while_it_grows(tmp_path: Path) -> None:
    """Not only at the next start: until then every search would scan the new vectors exactly."""
    settings = Settings(home=tmp_path, cache=CacheSettings(capacity=10_000, quantisation="int8"))
    cache = ImageCache(open_backend(settings), "wide", 1024, settings, ImageStore(settings.image_root))
    rows = np.random.default_rng(2).standard_normal((4000, 1024)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for start in range(0, 4000, 500):
        entries = [
            ImageEntry(id=uid(i), prompt="p", model="m", seed=0, size="16x16", depth=0, created_s=0.0, uri=f"{i}.png")
            for i in range(start, start + 500)
        ]
        cache.add_many(list(zip(entries, rows[start : start + 500], strict=True)))
    assert not cache.backend.tidy(cache.name("default"))  # nothing is left to do
    (match,) = cache.search(rows[1234])
    assert match.entry.id == uid(1234)
    cache.close()
