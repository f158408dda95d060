"""Administration over HTTP and the CLI, against a served router on both backends: import, search, verify, evict, purge."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from modm_tasks.client import Client
from modm_tasks.errors import InvalidInputError, ModmError, NotFoundError
from modm_tasks.image_store import path_for
from tests.support.cache import Served, make_folder, png, put, uid, use
from vector_store import admin
from vector_store.cache import ImageCache
from vector_store.cli import cache_app, parse_age_s


def test_import_search_list_stats(served: Served, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", 40)
    (folder / "broken.png").write_bytes(b"\x89PNG garbage")
    (folder / "note.jpg").write_text("not an image")
    done = served.modm("import", folder)
    assert done.exit_code == 0, done.output
    assert done.stdout == "imported 40, in the cache before 0, not imported 2\n"
    assert "not imported: broken.png: " in done.stderr
    assert "40/42" in done.stderr or "42/42" in done.stderr
    again = served.modm("import", folder, "--json")
    assert json.loads(again.stdout) | {"problems": []} == {"imported": 0, "skipped": 40, "problems": []}

    found = served.modm("search", "picture number7", "--limit", "3", "--json")
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert rows[0]["prompt"] == "picture number7"
    assert rows[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert (rows[0]["seed"], rows[0]["model"], rows[0]["depth"]) == (7, "imported", 0)
    by_image = served.modm("search", folder / "0007.png", "--limit", "1", "--json")
    assert json.loads(by_image.stdout)["id"] == rows[0]["id"]
    for suffix, start in (("html", b"<!doctype html>"), ("png", b"\x89PNG")):
        sheet = tmp_path / f"sheet.{suffix}"
        assert served.modm("search", "picture <b>number7", "--sheet", sheet).exit_code == 0
        assert sheet.read_bytes().startswith(start)
    assert b"<b>" not in (tmp_path / "sheet.html").read_bytes()
    assert served.modm("search", tmp_path / "none.png").exit_code == 2

    listed = served.modm("list", "--limit", "5", "--json")
    assert [json.loads(line)["seq"] for line in listed.stdout.splitlines()] == [40, 39, 38, 37, 36]
    served.cache.touch([use(rows[0]["id"], time.time(), 30)])
    stats = json.loads(served.modm("stats", "--json").stdout)
    assert stats["namespaces"]["default"]["images"] == stats["files"] == 40
    assert stats["namespaces"]["default"]["hits_by_k"] == {"30": 1}
    assert stats["hit_age_s"]["p50"] >= 0
    assert "default: 40 images, 1 hits (k=30: 1)" in served.modm("stats").stdout


def test_verify_finds_and_mends(served: Served) -> None:
    cache = served.cache
    entries = [put(cache, n) for n in range(6)]
    cache.images.delete(entries[0].uri)
    cache.images.write_atomic(entries[1].uri, b"garbage")
    for n in (70, 71):
        cache.images.write_atomic(path_for(uid(n), 1), png("left over"))
    served.in_use = {uid(71)}  # the ledger still refers to it: a result that is not cached
    cache.backend.create("images_other-embedder_default", 8)
    later = time.time() + 3600
    report = admin.verify(cache, deep=True, now_s=later, referenced=lambda asked: served.in_use.intersection(asked))
    assert report.checked == 6
    assert report.vectors_without_file == [uid(0)]
    assert report.unreadable_files == [uid(1)]
    assert report.files_without_vector == [path_for(uid(70), 1)]
    assert report.other_embedders == ["images_other-embedder_default"]
    assert not report.clean
    assert served.modm("verify").exit_code == 1
    mended = served.modm("verify", "--repair", "--deep")
    assert mended.exit_code == 0
    assert "repaired 2" in mended.stdout
    admin.verify(cache, repair=True, now_s=later, referenced=lambda asked: served.in_use.intersection(asked))
    assert admin.verify(cache, deep=True, now_s=later, referenced=lambda a: served.in_use.intersection(a)).clean
    assert {e.id for e in cache.iterate()} == {uid(n) for n in range(2, 6)}
    assert cache.images.exists(path_for(uid(71), 1))


def test_without_word_from_the_ledger_recent_files_are_left_alone(cache: ImageCache) -> None:
    cache.images.write_atomic(path_for(uid(1), 1), png("a result"))
    assert admin.verify(cache, repair=True, now_s=time.time() + 86_400).clean
    assert admin.verify(cache, repair=True, now_s=time.time() + 3 * 86_400).repaired == 1


def test_a_collection_of_another_dimension_is_wrong_and_repaired(cache: ImageCache) -> None:
    cache.backend.create(cache.name("odd"), 8)
    assert admin.verify(cache, now_s=0).wrong_dimension == [cache.name("odd")]
    assert admin.verify(cache, repair=True, now_s=0).repaired == 1
    assert cache.namespaces() == []


def test_evict_by_each_rule(served: Served) -> None:
    cache, now_s = served.cache, time.time()
    for n in range(6):
        put(cache, n, created_s=now_s - (5 - n) * 3600)
    cache.touch([use(uid(5), now_s, 30)])
    served.in_use = {uid(1)}
    assert served.modm("evict", "--older-than", "210m").stdout == "evicted 1\n"
    assert {e.id for e in cache.iterate()} == {uid(n) for n in (1, 2, 3, 4, 5)}
    served.in_use = set()
    assert json.loads(served.modm("evict", "--keep", "3", "--json").stdout)["evicted"] == 2
    assert served.modm("evict", "--below", "1").stdout == "evicted 2\n"
    assert {e.id for e in cache.iterate()} == {uid(5)}
    assert len(list(cache.images.list())) == 1
    for wrong in ((), ("--keep", "1", "--below", "2"), ("--older-than", "soon")):
        assert served.modm("evict", *wrong).exit_code == 2


def test_purge_reaches_everything_refined_from_it(served: Served) -> None:
    cache = served.cache
    put(cache, 1, "A Cat ", client="ann")
    put(cache, 2, client="bob", source_id=uid(1), depth=1)
    put(cache, 3, client="bob", source_id=uid(2), depth=2)
    put(cache, 4, client="bob")
    put(cache, 5, client="bob", source_id=uid(4), depth=1, namespace="other")
    cache.remove("default", [uid(2)])
    assert served.modm("purge", "--prompt", "a cat").stdout == "purged 2\n"
    assert served.purged == [uid(1), uid(3)]
    assert json.loads(served.modm("purge", "--image", uid(4), "--json").stdout)["purged"] == 2
    assert cache.count() == cache.count("other") == 0
    assert list(cache.images.list()) == []
    put(cache, 6, client="ann")
    put(cache, 7, client="bob")
    assert served.modm("purge", "--client", "ann").stdout == "purged 1\n"
    assert {e.id for e in cache.iterate()} == {uid(7)}
    assert served.modm("purge").exit_code == 2
    assert served.modm("purge", "--image", "0000").exit_code == 2
    assert served.modm("purge", "--client", "a", "--prompt", "b").exit_code == 2


def test_hostile_uploads_are_refused_one_by_one(served: Served) -> None:
    with Client(served.url) as client:
        big = io.BytesIO()
        Image.new("1", (5000, 5000)).save(big, format="PNG")
        captions = [{"file": f, "prompt": "x"} for f in ("a.png", "b.png", "c.png")]
        files = [("files", big.getvalue()), ("files", b"GIF89a"), ("files", png("fine"))]
        answer = client.upload("/v1/cache/import", files, {"captions": json.dumps(captions)})
        assert answer["imported"] == 1
        assert [p["file"] for p in answer["problems"]] == ["a.png", "b.png"]
        for captions_text in ("[", "{}", "[[[", json.dumps([{"file": "../a", "prompt": "x"}]), "[]"):
            with pytest.raises(InvalidInputError):
                client.upload("/v1/cache/import", files[2:], {"captions": captions_text})
        with pytest.raises(ModmError, match=r"not a UUID"):
            client.get("/v1/cache/entries/..%00etc")
        with pytest.raises(NotFoundError):
            client.get(f"/v1/cache/entries/{uid(77)}/image")
        for body in ({"text": ""}, {"text": "x", "namespace": "A/b"}, {"text": "x", "limit": 0}, {"text": "x", "y": 1}):
            with pytest.raises(InvalidInputError):
                client.post("/v1/cache/search", body)
    half_a_pair = httpx.post(
        f"{served.url}/v1/cache/search", content=b'{"text": "\\ud800"}', headers={"content-type": "application/json"}
    )
    assert half_a_pair.status_code == 422
    assert served.cache.count() == 1


def test_no_orchestrator_is_exit_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODM_URL", "http://127.0.0.1:9")
    result = CliRunner().invoke(cache_app, ["stats"])
    assert result.exit_code == 3
    assert "modm up" in result.stderr


def test_simulate_by_command(tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    words = ["cat", "dog", "owl", "fox", "hen", "cow", "pig"]
    trace.write_text("".join(f"{words[n % 7]}\n" for n in range(60)))
    args = ["simulate", str(trace), "--embedder", "fake", "--sizes", "3,10", "--policies", "fifo,lru"]
    result = CliRunner().invoke(cache_app, [*args, "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    rows = {(r["policy"], r["size"]): r["hit_rate"] for r in json.loads(result.stdout)}
    assert rows["fifo", 10] == pytest.approx(53 / 60)
    assert rows["fifo", 3] < rows["fifo", 10]
    assert len(list(csv.DictReader((tmp_path / "out" / "summary.csv").read_text().splitlines()))) == 4
    assert CliRunner().invoke(cache_app, ["simulate"]).exit_code == 2


@pytest.mark.parametrize(("text", "age_s"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("7d", 604_800)])
def test_ages(text: str, age_s: float) -> None:
    assert parse_age_s(text) == age_s
