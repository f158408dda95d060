"""What a folder of images says it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modm_tasks.errors import InvalidInputError, NotFoundError
from vector_store.folder import check_file, item_id, item_of, read_item, scan


def touch(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"image")
    return path


def test_captions_come_from_jsonl_then_txt_then_the_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "sub/a_red-cat.webp", "notes.md"):
        touch(tmp_path, name)
    (tmp_path / "a.txt").write_text("not used: the JSONL comes first")
    (tmp_path / "b.txt").write_text(" a blue dog \n")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "a.png", "prompt": "a cat", "seed": 7, "model": "m"}))
    items, problems = scan(tmp_path)
    assert not problems
    assert [(i.file, i.prompt, i.seed, i.model) for i in items] == [
        ("a.png", "a cat", 7, "m"),
        ("b.jpg", "a blue dog", None, ""),
        ("sub/a_red-cat.webp", "a red cat", None, ""),
    ]


def test_symlinks_are_refused_and_listed(tmp_path: Path) -> None:
    outside = touch(tmp_path / "outside", "secret.png")
    folder = tmp_path / "in"
    touch(folder, "good.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    items, problems = scan(folder)
    assert [i.file for i in items] == ["good.png"]
    assert {p.file for p in problems} == {"link.png", "linked"}
    with pytest.raises(NotFoundError):
        read_item(folder, "link.png")


def test_bad_caption_rows_are_listed_with_their_line(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    rows = ['{"file": "../etc/a.png", "prompt": "x"}', "not json", '{"file": "gone.png", "prompt": "x"}', "[1]"]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    items, problems = scan(tmp_path)
    assert [i.file for i in items] == ["a.png"]
    assert [p.file for p in problems] == [
        "captions.jsonl, line 1",
        "captions.jsonl, line 2",
        "captions.jsonl, line 4",
        "gone.png",
    ]


def test_an_empty_caption_and_a_binary_one_are_problems(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        touch(tmp_path, name)
    (tmp_path / "a.txt").write_text("  ")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    items, problems = scan(tmp_path)
    assert not items
    assert [p.file for p in problems] == ["a.png", "b.png"]


def test_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no folder"):
        scan(tmp_path / "none")


def test_the_id_depends_on_namespace_path_and_content() -> None:
    ids = {item_id(n, f, d) for n in ("a", "b") for f in ("x.png", "y.png") for d in (b"1", b"2")}
    assert len(ids) == 8
    assert item_id("a", "x.png", b"1") in ids


@pytest.mark.parametrize("file", ["/etc/passwd", "../a.png", "a/../../b.png", "a\\b.png", "", "a\0.png"])
def test_paths_out_of_the_folder_are_refused(file: str) -> None:
    assert check_file(file)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_any_caption_row_is_an_item_or_an_input_error(row: object) -> None:
    if isinstance(row, dict):
        row = {"file": "a.png", "prompt": "x", **row}
    try:
        item = item_of(row)
    except InvalidInputError:
        return
    assert not check_file(item.file)
    assert item.prompt.strip()
