"""Downloads against a server in this process: resumed, checked, and never a half file under the final name."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modm_tasks.errors import InvalidInputError, UnavailableError
from orchestrator.cli_trace import trace_app
from orchestrator.traces.fetch import fetch_dataset

DATA = bytes(range(256)) * 4096
SHA = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    cut_at: int | None = None
    etag = '"one"'
    stated = ""
    ranges: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/metadata.parquet?download=true"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("range", "")
        self.server.ranges.append(asked)
        if not self.path.startswith("/metadata.parquet"):
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if self.headers.get("if-range", self.server.etag) != self.server.etag:
            start, asked = 0, ""
        if start >= len(DATA):
            self.send_response(416)
            self.send_header("content-range", f"bytes */{len(DATA)}")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self.send_response(206 if asked else 200)
        self.send_header("content-length", str(len(DATA) - start))
        self.send_header("etag", self.server.etag)
        if self.server.stated:
            self.send_header("x-linked-etag", f'"{self.server.stated}"')
        self.end_headers()
        end = len(DATA) if self.server.cut_at is None else self.server.cut_at
        self.wfile.write(DATA[start:end])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the test's own output is what counts."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as http:
        http.ranges = []
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield http
        http.shutdown()
        thread.join()


def test_a_broken_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.cut_at = 700_000
    with pytest.raises(UnavailableError, match="run it again"):
        fetch_dataset("diffusiondb", tmp_path, url=server.url)
    assert not (tmp_path / "diffusiondb-metadata.parquet").exists()
    have = (tmp_path / "diffusiondb-metadata.parquet.part").stat().st_size
    assert 0 < have <= 700_000
    server.cut_at = None
    file = fetch_dataset("diffusiondb", tmp_path, url=server.url, sha256=SHA.upper())
    assert file.read_bytes() == DATA
    assert server.ranges == ["", f"bytes={have}-"]
    assert [p.name for p in tmp_path.iterdir()] == ["diffusiondb-metadata.parquet"]


def test_a_part_of_another_version_is_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.cut_at = 700_000
    with pytest.raises(UnavailableError):
        fetch_dataset("diffusiondb", tmp_path, url=server.url)
    server.cut_at, server.etag = None, '"two"'
    assert fetch_dataset("diffusiondb", tmp_path, url=server.url, sha256=SHA).read_bytes() == DATA


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_a_part_that_is_whole_or_too_long(server: Server, tmp_path: Path, extra: bytes) -> None:
    (tmp_path / "mjhq-metadata.parquet.part").write_bytes(DATA + extra)
    assert fetch_dataset("mjhq", tmp_path, url=server.url).read_bytes() == DATA


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="removed"):
        fetch_dataset("diffusiondb", tmp_path, url=server.url, sha256="0" * 64)
    server.stated = "1" * 64  # what the hub says of its own file
    with pytest.raises(InvalidInputError, match="not 1111"):
        fetch_dataset("diffusiondb", tmp_path, url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_the_command(server: Server, tmp_path: Path) -> None:
    run = CliRunner()
    args = ["fetch", "diffusiondb", "-d", str(tmp_path), "--url", server.url]
    first = run.invoke(trace_app, [*args, "--sha256", SHA])
    assert first.exit_code == 0
    assert first.stdout.strip() == str(tmp_path / "diffusiondb-metadata.parquet")
    assert "100 %" in first.stderr
    assert "there already" in run.invoke(trace_app, args).stderr
    assert run.invoke(trace_app, ["fetch", "laion"]).exit_code == 2
    assert run.invoke(trace_app, [*args, "--sha256", "abc"]).exit_code == 2
    away = ["fetch", "mjhq", "-d", str(tmp_path), "--url", server.url.replace("metadata", "other")]
    failed = run.invoke(trace_app, away)
    assert failed.exit_code == 3
    assert failed.stderr.startswith("error: cannot fetch")
