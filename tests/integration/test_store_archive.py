"""What must outlast something, on both backends: export, snapshot and restore, a reindex, an import that is killed."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from modm_tasks.errors import ConflictError, InvalidInputError, NotFoundError
from modm_tasks.image_store import path_for
from tests.support.cache import EMBEDDER, Served, make_cache, make_folder, put, uid, use
from vector_store import admin, archive
from vector_store.cache import ImageCache
from vector_store.embedder import HashEmbedder, Vector
from vector_store.importer import import_folder
from vector_store.reindex import Reindexer


class OtherEmbedder(HashEmbedder):
    """Another space: the same vectors turned around, under another name."""

    identity = "fake-other"

    def embed_images(self, images: Any) -> Vector:
        return -super().embed_images(images)


def test_export_can_be_imported_elsewhere(served: Served, tmp_path: Path) -> None:
    for n in range(3):
        put(served.cache, n, f"a prompt, №{n}")
    assert served.modm("export", tmp_path / "out").stdout.startswith("exported 3 images")
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["seed"]) for r in rows] == [(f"a prompt, №{n}", n) for n in range(3)]
    taken = served.modm("import", tmp_path / "out", "--namespace", "copy")
    assert taken.stdout.startswith("imported 3")
    assert {e.prompt for e in served.cache.iterate("copy")} == {r["prompt"] for r in rows}
    assert served.modm("export", tmp_path / "out").exit_code == 2


def test_snapshot_destroy_restore_verify(served: Served, tmp_path: Path) -> None:
    for n in range(20):
        put(served.cache, n)
    served.cache.touch([use(uid(3), 150.0, 25)])
    before = sorted(served.cache.iterate(), key=lambda e: e.seq)
    file = tmp_path / "cache.tar"
    assert "checksums good" in served.modm("snapshot", file).stdout
    assert served.modm("clear").exit_code == 2
    assert served.modm("clear", "--yes").stdout == "cleared 20\n"
    assert list(served.cache.images.list()) == []
    assert served.modm("restore", file).stdout == "restored 20 images of namespace default\n"
    assert sorted(served.cache.iterate(), key=lambda e: e.seq) == before
    assert served.modm("verify", "--deep").exit_code == 0
    assert served.cache.search(EMBEDDER.embed_texts(["picture number3"])[0])[0].entry.id == uid(3)
    assert put(served.cache, 50).seq == 21


def rewrite(source: Path, target: Path, change: dict[str, bytes | None], extra: dict[str, bytes] | None = None) -> None:
    """The same tar with some members changed, dropped or added."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            data = change.get(member.name, data) if member.name in change else data
            if data is None:
                continue
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
        for name, data in (extra or {}).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))


def test_a_broken_snapshot_changes_nothing(cache: ImageCache, tmp_path: Path) -> None:
    for n in range(3):
        put(cache, n)
    good, bad = tmp_path / "good.tar", tmp_path / "bad.tar"
    good.write_bytes(b"".join(archive.snapshot_stream(cache)))
    image = "images/" + path_for(uid(1), 1)
    cases: list[dict[str, Any]] = [
        {"change": {image: b"other bytes"}},
        {"change": {image: None}},
        {"change": {"SHA256SUMS": None}},
        {"change": {"SHA256SUMS": None}, "extra": {"../evil": b"x"}},
        {"change": {}, "extra": {"late": b"x"}},
    ]
    for case in cases:
        rewrite(good, bad, **case)
        with pytest.raises(InvalidInputError, match="snapshot"):
            archive.restore(cache, bad, replace=True)
    for cut in (0, 100, 1500, good.stat().st_size // 2):
        bad.write_bytes(good.read_bytes()[:cut])
        with pytest.raises(InvalidInputError, match="snapshot"):
            archive.restore(cache, bad, replace=True)
    with tarfile.open(bad, "w") as tar:
        link = tarfile.TarInfo(image)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InvalidInputError, match="regular file"):
        archive.restore(cache, bad)
    with pytest.raises(NotFoundError):
        archive.restore(cache, tmp_path / "none.tar")
    assert cache.count() == 3
    assert not (tmp_path / "evil").exists()


def test_a_snapshot_of_another_embedder_is_refused(cache: ImageCache, tmp_path: Path) -> None:
    put(cache, 1)
    file = tmp_path / "a.tar"
    file.write_bytes(b"".join(archive.snapshot_stream(cache)))
    other = ImageCache(cache.backend, "fake-other", cache.dim, cache.settings, cache.images)
    with pytest.raises(ConflictError, match="reindex"):
        archive.restore(other, file)


def test_reindex_switches_at_the_end_and_goes_on_after_a_stop(cache: ImageCache) -> None:
    for n in range(10):
        put(cache, n)
    cache.images.delete(path_for(uid(4), 1))
    other = OtherEmbedder()
    new = ImageCache(cache.backend, other.identity, cache.dim, cache.settings, cache.images)
    first = Reindexer(new, other).step("default", batch=4)
    assert (first.total, first.done, first.finished) == (10, 4, False)
    assert new.count() == 0
    fresh = put(new, 50)
    assert fresh.seq == 1
    states = list(Reindexer(new, other).run("default"))
    assert states[-1].finished
    assert (states[-1].done, states[-1].unreadable) == (9, 1)
    assert {e.id for e in new.iterate()} == {uid(n) for n in range(10) if n != 4} | {uid(50)}
    newest = sorted(new.iterate(), key=lambda e: e.seq)
    assert [e.id for e in newest[-2:]] == [uid(9), uid(50)]
    vector = new.vector_of(uid(3))
    assert vector is not None
    assert vector @ EMBEDDER.embed_texts(["picture number3"])[0] == pytest.approx(-1, abs=1e-5)
    assert cache.namespaces() == []
    assert [c for c in cache.backend.collections() if c.startswith("build_")] == []
    assert Reindexer(new, other).namespaces() == []


def test_reindex_by_command(served: Served) -> None:
    old = ImageCache(served.cache.backend, "fake-old", EMBEDDER.dim, served.cache.settings, served.cache.images)
    for n in range(5):
        put(old, n)
    assert "of another embedder: images_fake-old_default" in served.modm("stats").stdout
    assert served.modm("reindex", "--keep-old").stdout == "default: 5 images embedded, 0 unreadable\n"
    assert served.cache.count() == 5
    assert old.count() == 5
    assert served.modm("reindex").exit_code == 0
    assert old.count() == 0
    assert served.modm("reindex").stdout.startswith("nothing to do")


@pytest.mark.timeout(600)  # every image is synced to disk, so a busy disk decides the time
@pytest.mark.parametrize("url", ["edge:", "local:"])
def test_an_import_killed_half_way_is_resumed(tmp_path: Path, url: str) -> None:
    folder, home = make_folder(tmp_path / "in", 2000), tmp_path / "home"
    url = url if url == "edge:" else f"local:{tmp_path / 'qdrant'}"
    code = (
        "import sys; from pathlib import Path; from modm_tasks.image_store import ImageStore;"
        "from modm_tasks.settings import Settings; from vector_store.backends import open_backend;"
        "from vector_store.cache import ImageCache; from vector_store.embedder import HashEmbedder;"
        "from vector_store.importer import import_folder\n"
        "s = Settings(home=Path(sys.argv[1]), qdrant_url=sys.argv[3]); e = HashEmbedder();"
        "c = ImageCache(open_backend(s), e.identity, e.dim, s, ImageStore(s.image_root))\n"
        "import_folder(c, e, Path(sys.argv[2]), progress=lambda p: print(p.done, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(home), str(folder), url], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        while int(run.stdout.readline()) < 300:
            pass
        run.send_signal(signal.SIGKILL)
        run.wait(timeout=10)
    cache = make_cache(home, url)
    before = cache.count()
    assert 300 <= before < 2000
    report = import_folder(cache, EMBEDDER, folder)
    assert report.problems == []
    assert (report.skipped, report.imported) == (before, 2000 - before)
    assert cache.count() == 2000
    assert {e.prompt for e in cache.iterate()} == {f"picture number{n}" for n in range(2000)}
    assert admin.verify(cache, now_s=time.time() + 10 * 86_400).clean
    cache.close()
