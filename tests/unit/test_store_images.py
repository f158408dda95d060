"""The image store: names, atomic writes, no way out of the root."""

from __future__ import annotations

import io
import os
import threading
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modm_tasks.errors import InvalidInputError, NotFoundError, SourceImageError, UnavailableError
from modm_tasks.image_store import ImageStore, decode_image, path_for, request_id_of

ID = str(uuid.UUID(int=99))


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ImageStore:
    return ImageStore(str(tmp_path / "images") if request.param == "local" else f"memory://{uuid.uuid4()}")


def image(colour: str = "red") -> Image.Image:
    made = Image.new("RGB", (16, 16), colour)
    made.info["modm:prompt"] = "a réd squäre"
    made.info["secret"] = "of another program"
    return made


def test_what_is_written_is_read_with_our_text_and_no_other(store: ImageStore) -> None:
    uri, n_bytes = store.write(ID, 2, image())
    assert uri == path_for(ID, 2)
    assert request_id_of(uri) == ID
    assert len(store.read_bytes(uri)) == n_bytes
    back = store.read(uri)
    assert back.getpixel((3, 3)) == (255, 0, 0)
    assert back.info == {"modm:prompt": "a réd squäre"}
    assert [(f.uri, f.bytes) for f in store.list()] == [(uri, n_bytes)]
    assert store.usage() == (1, n_bytes)


def test_a_second_write_replaces_and_a_delete_is_told_once(store: ImageStore) -> None:
    uri, _ = store.write(ID, 1, image())
    store.write_atomic(uri, image("blue"))
    assert store.read(uri).getpixel((0, 0)) == (0, 0, 255)
    assert store.exists(uri)
    assert store.delete(uri)
    assert not store.delete(uri)
    assert not store.exists(uri)
    with pytest.raises(NotFoundError):
        store.read_bytes(uri)
    with pytest.raises(SourceImageError, match="gone"):
        store.read(uri)


def test_an_empty_store_lists_nothing(store: ImageStore) -> None:
    assert list(store.list()) == []


@pytest.mark.parametrize(
    "uri",
    ["../../etc/passwd", "/etc/passwd", "aa/../../x", f"00/{ID}-1.png/..", f"ff/{ID}-1.png", f"00/{ID}-1.jpg", ""],
)
def test_foreign_names_are_refused_everywhere(store: ImageStore, uri: str) -> None:
    for call in (store.read_bytes, store.delete, lambda u: store.write_atomic(u, b"x")):
        with pytest.raises(InvalidInputError):
            call(uri)
    with pytest.raises(SourceImageError):
        store.read(uri)
    assert not store.exists(uri)


@given(st.text(max_size=80))
def test_no_text_but_our_names_is_a_uri(text: str) -> None:
    with pytest.raises(InvalidInputError):
        request_id_of(text)


@pytest.mark.parametrize(("request_id", "attempt"), [("x", 1), ("../a", 1), (ID, -1), (ID, 10**6)])
def test_only_uuids_and_small_attempts_make_a_name(request_id: str, attempt: int) -> None:
    with pytest.raises(InvalidInputError):
        path_for(request_id, attempt)


def test_symlinks_are_not_followed(tmp_path: Path) -> None:
    store = ImageStore(str(tmp_path / "images"))
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    link = tmp_path / "images" / path_for(ID, 1)
    link.parent.mkdir(parents=True)
    link.symlink_to(secret)
    with pytest.raises(InvalidInputError, match="symlink"):
        store.read_bytes(path_for(ID, 1))
    assert list(store.list()) == []
    assert store.delete(path_for(ID, 1))
    assert secret.read_bytes() == b"secret"
    other = tmp_path / "elsewhere"
    other.mkdir()
    os.rmdir(link.parent)
    link.parent.symlink_to(other)
    with pytest.raises(InvalidInputError, match="symlink"):
        store.write(ID, 1, image())
    assert list(other.iterdir()) == []


def test_readers_never_see_half_an_image(tmp_path: Path) -> None:
    store = ImageStore(str(tmp_path))
    uri, _ = store.write(ID, 1, image())
    end, bad = threading.Event(), []

    def read() -> None:
        while not end.is_set():
            try:
                store.read(uri)
            except SourceImageError as error:
                bad.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(60):
        store.write_atomic(uri, image("red" if n % 2 else "blue"))
    end.set()
    reader.join(timeout=10)
    assert not bad
    assert [p.name for p in (tmp_path / "00").iterdir()] == [f"{ID}-1.png"]


def test_a_store_that_cannot_be_written_is_unavailable_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "00").write_text("a file where a folder should be")
    with pytest.raises(UnavailableError, match="cannot write"):
        ImageStore(str(tmp_path)).write(ID, 1, image())


@pytest.mark.parametrize("cut", [0, 10, 60])
def test_garbage_and_truncated_files_are_source_errors(tmp_path: Path, cut: int) -> None:
    store = ImageStore(str(tmp_path))
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    uri, _ = store.write(ID, 1, noise)
    store.write_atomic(uri, store.read_bytes(uri)[:cut])
    with pytest.raises(SourceImageError, match="not a readable"):
        store.read(uri)


@pytest.mark.parametrize(("side", "why"), [(5_000, "5000x5000 pixels"), (20_000, "DecompressionBomb")])
def test_a_bomb_is_refused_by_its_header(side: int, why: str) -> None:
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, format="PNG")
    with pytest.raises(SourceImageError, match=why):
        decode_image(out.getvalue())


def test_formats_are_sniffed_not_believed() -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, format="GIF")
    with pytest.raises(SourceImageError, match="not a readable"):
        decode_image(out.getvalue())
