"""Every entrance but the HTTP API under drawn input: a value or one line that names the mistake; never a traceback,
never a file that is half written. The API's own test is tests/integration/test_fuzz_api.py.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from modm_tasks.errors import ConfigError, ModmError
from modm_tasks.image_store import ImageStore
from modm_tasks.settings import Section, Settings, load_settings
from orchestrator.auth import KeyFile
from orchestrator.traces.inspect import write_jsonl
from orchestrator.traces.load import FIELDS, FORMATS, load_trace, stream_trace
from tests.support.fuzz import NUMBER, ODD_TEXT, TEXT, VALUE, seeded
from vector_store.backends import open_backend
from vector_store.cache import ImageCache
from vector_store.embedder import HashEmbedder
from vector_store.importer import import_folder
from workers.catalogue import ModelEntry, check_pair, load_catalogue, missing_weights


def names_of_settings() -> list[str]:
    names = []
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            names += [f"{name}.{sub}" for sub in section.model_fields]
        else:
            names.append(name)
    return names


SETTINGS = names_of_settings()


def one_line(error: ModmError, *names: str) -> None:
    """A refusal as a user sees it: one line, that holds one of ``names`` where there are some."""
    text = str(error)
    assert text.strip()
    assert len(text.splitlines()) == 1, text
    assert not names or any(name in text for name in names), text


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def usable(settings: Settings) -> None:
    """What was accepted can be used, or is refused in one line by what uses it."""
    ImageStore(settings.image_root)
    for use in (lambda: check_pair(settings), KeyFile(settings.api.keys_file or settings.home / "keys.json").load):
        try:
            use()
        except ModmError as error:
            one_line(error)


ENVIRONMENT_TEXT = TEXT.map(lambda text: text.encode("utf-8", "replace").replace(b"\0", b"").decode())


@given(values=st.dictionaries(st.sampled_from(SETTINGS), ENVIRONMENT_TEXT | NUMBER.map(str), min_size=1, max_size=3))
@seeded("settings", parts=2)
def test_any_environment_is_settings_or_one_line_that_names_one(values: dict[str, str]) -> None:
    named = {f"MODM_{name.replace('.', '__').upper()}": value for name, value in values.items()}
    with environment(named):
        try:
            settings = load_settings()
        except ConfigError as error:
            one_line(error, *values)
            return
    assert isinstance(settings, Settings)
    usable(settings)


def toml(table: dict[str, Any]) -> str:
    """Near TOML: JSON's values are TOML's but for null, nan and objects, which make a broken file, as they should."""
    rows = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            rows += [f"[{json.dumps(key)}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())]
    return "\n".join(rows)


SECTIONS = list(Settings.model_fields)
FILE = st.dictionaries(
    st.sampled_from(SECTIONS), VALUE | st.dictionaries(st.text(max_size=8), VALUE, max_size=2), max_size=3
)


@given(content=FILE.map(lambda table: toml(table).encode("utf-8", "replace")) | st.binary(max_size=200))
@seeded("settings", parts=2)
def test_any_file_is_settings_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("settings") / "modm.toml"
    path.write_bytes(content)
    with environment({"MODM_CONFIG": str(path)}):
        try:
            settings = load_settings()
        except ConfigError as error:
            one_line(error)
            return
    assert isinstance(settings, Settings)
    usable(settings)


ENTRY = st.fixed_dictionaries(
    {}, optional={name: VALUE for name in ModelEntry.model_fields if name != "name"} | {"other": VALUE}
)
CATALOGUE = st.dictionaries(st.text(max_size=8) | st.just("scenes-large"), ENTRY | VALUE, max_size=2)
CARD = st.binary(max_size=60) | VALUE.map(lambda v: json.dumps(v).encode())


@given(content=CATALOGUE.map(lambda table: toml(table).encode("utf-8", "replace")) | st.binary(max_size=200),
       card=CARD, index=CARD)  # fmt: skip
@example(content=b"", card=b"null", index=b"{}")
@example(content=b"", card=b"{}", index=b'{"a\\u0085b": ["x", "y"]}')
@example(content=b"", card=b"{}", index=b'{"vae": []}')
@seeded("catalogue")
def test_any_catalogue_is_models_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, card: bytes, index: bytes
) -> None:
    folder = tmp_path_factory.mktemp("models")
    (folder / "local").mkdir()
    (folder / "local" / "modm.json").write_bytes(card)
    (folder / "local" / "model_index.json").write_bytes(index)
    for number, text in enumerate((content, b'[mine]\nfolder = "local"\n')):
        path = folder / f"{number}.toml"
        path.write_bytes(text)
        try:
            for entry in load_catalogue(path).values():
                problem = missing_weights(entry)
                assert problem is None or len(problem.splitlines()) == 1
        except ConfigError as error:
            one_line(error)


ROW = st.fixed_dictionaries(
    {"prompt": VALUE | st.just("a cat")}, optional=dict.fromkeys(sorted(FIELDS - {"prompt"} | {"odd"}), VALUE)
)
LINES = st.lists(ROW.map(json.dumps) | TEXT, max_size=4).map("\n".join)
CSV = st.lists(st.lists(TEXT, max_size=5).map(",".join), max_size=4).map(
    lambda rows: "\n".join(["gmt_create,num_images_per_prompt,num_inference_steps", *rows])
)
CALLS = st.lists(
    st.dictionaries(st.sampled_from(["prompt", "width", "height", "num_inference_steps"]), VALUE, max_size=4).map(
        lambda row: "Request(" + ", ".join(f"{k}={v!r}" for k, v in row.items()) + ")"
    ),
    max_size=3,
).map("\n".join)
TRACE = (LINES | VALUE.map(json.dumps) | CSV | CALLS).map(lambda text: text.encode("utf-8", "replace"))
COLUMNS = st.sampled_from([pa.string(), pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("s"), pa.binary()])


@st.composite
def parquet(draw: st.DrawFn) -> bytes:
    """A file with the right columns of any type, some of it changed or cut."""
    names = draw(st.lists(st.sampled_from(["prompt", "timestamp", "seed", "user_name"]), unique=True, max_size=4))
    raw = [draw(st.lists(st.integers(-5, 5) | st.none(), min_size=2, max_size=2)) for _ in names]
    columns = {name: pa.array(values, pa.int64()).cast(pa.string()) for name, values in zip(names, raw, strict=True)}
    for name, values in zip(names, raw, strict=True):
        kind = draw(COLUMNS)
        numeric = pa.array(values, pa.int64())
        columns[name] = numeric.cast(pa.string()).cast(kind) if pa.types.is_binary(kind) else numeric.cast(kind)
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    data = bytearray(out.getvalue())
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])


@given(content=TRACE | st.binary(max_size=200) | parquet(), format_name=st.sampled_from([None, *FORMATS]),
       start=st.sampled_from([0, 0, 0, 1, 10**9]), count=st.sampled_from([None, None, 1]), skip=st.booleans())  # fmt: skip
@example(content=b'{"prompt": null}', format_name="jsonl", start=0, count=None, skip=False)
@example(content=b"Request(prompt={[]: 1})", format_name="vllm-omni", start=0, count=None, skip=False)
@seeded("traces")
def test_any_trace_is_rows_or_one_line_and_converts_whole_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, format_name: str | None, start: int, count: int | None,
    skip: bool,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("trace")
    is_parquet = content[:4] == b"PAR1"
    file, out = folder / ("t.parquet" if is_parquet else "trace"), folder / "out.jsonl"
    file.write_bytes(content)
    (folder / "prompts").write_text("one\ntwo\n")
    if is_parquet:
        format_name = None
    stream_of = {"format": format_name, "start": start, "num_requests": count, "prompts": folder / "prompts",
                 "skip_bad_rows": skip}  # fmt: skip
    try:
        written = write_jsonl(stream_trace(file, **stream_of), out)  # type: ignore[arg-type]
    except ModmError as error:
        one_line(error, file.name, "prompts")
        written = -1
    if written < 0:
        assert sorted(p.name for p in folder.iterdir()) == sorted([file.name, "prompts"])
        return
    assert len(load_trace(out).rows) == written


def encoded(form: str, side: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(out, form)
    return out.getvalue()


IMAGES = {(form, side): encoded(form, side) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP") for side in (8, 32, 64)}


@st.composite
def image(draw: st.DrawFn) -> bytes:
    """An image file of any form and size, perhaps changed or cut, or no image at all."""
    data = bytearray(draw(st.sampled_from(sorted(IMAGES.values()))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 5]))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.just(len(data)) | st.integers(0, len(data)))
    return draw(st.just(bytes(data[:cut])) | st.binary(max_size=50))


FILES = st.dictionaries(
    st.sampled_from(["a.png", "b.jpg", "c.webp", "sub/d.PNG", "e_red-cat.jpeg", "f.txt", "captions"]),
    image(),
    max_size=4,
)
FILE_NAME = st.sampled_from(["a.png", "b.jpg", "../a.png"]) | VALUE
CAPTION = st.fixed_dictionaries({}, optional={"file": FILE_NAME, "prompt": VALUE, "seed": VALUE, "model": VALUE})


@given(files=FILES, captions=st.lists(CAPTION.map(json.dumps) | ODD_TEXT, max_size=3).map("\n".join),
       beside=st.binary(max_size=30) | TEXT.map(lambda t: t.encode("utf-8", "replace")))  # fmt: skip
@seeded("import")
def test_any_folder_is_imported_or_listed_and_leaves_nothing_half_written(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], captions: str, beside: bytes
) -> None:
    home = tmp_path_factory.mktemp("import")
    folder = home / "in"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    folder.mkdir(exist_ok=True)
    (folder / "captions.jsonl").write_text(captions, encoding="utf-8", errors="replace")
    (folder / "a.txt").write_bytes(beside)
    settings = load_settings(home=home, qdrant_url="local:" + str(home / "vectors"))
    embedder, store, backend = HashEmbedder(), ImageStore(settings.image_root), open_backend(settings)
    try:
        cache = ImageCache(backend, embedder.identity, embedder.dim, settings, store)
        report = import_folder(cache, embedder, folder, now_s=1.0)
        assert all(p.reason and len(p.reason.splitlines()) == 1 for p in report.problems)
        stored = {entry.uri: store.read(entry.uri) for entry in cache.iterate()}
    finally:
        backend.close()
    assert len(stored) == report.imported
    assert {stored_file.uri for stored_file in store.list()} == set(stored)
    assert not list(home.rglob("*.part"))
