"""The examples of docs/cache.md. With MODM_TEST_UPDATE_DOCS=1 their outputs are written into it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from modm_tasks.image_store import ImageStore, to_png
from modm_tasks.settings import Settings
from tests.support.cache import Served
from vector_store.backends import open_backend
from vector_store.cache import ImageCache
from vector_store.cli import cache_app
from vector_store.embedder import HashEmbedder

DOC = Path(__file__).parents[2] / "docs" / "cache.md"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
PROMPTS = ("a red circle on plain grey", "a blue square", "two green circles", "a red triangle")


def example_files(folder: Path) -> None:
    (folder / "warm").mkdir()
    for number, prompt in enumerate(PROMPTS):
        image = Image.new("RGB", (64, 64), (60 * number, 80, 90))
        image.info["modm:prompt"] = prompt
        (folder / "warm" / f"{prompt.replace(' ', '_')}.png").write_bytes(to_png(image))
    (folder / "warm" / "a_red_circle.jpg").write_text("not an image")
    (folder / "trace.txt").write_text("a red circle\na blue square\na red circle\ntwo green circles\na red circle\n")


def run(line: str) -> str:
    """What a command prints, stdout after stderr, with what differs from run to run blotted out."""
    if line.startswith("$ rm "):
        return subprocess.run(line.removeprefix("$ "), shell=True, check=True, capture_output=True, text=True).stdout
    command = shlex.split(line.removeprefix("$ "))
    assert command[:2] == ["modm", "cache"]
    result = CliRunner().invoke(cache_app, command[2:])
    text = (
        re.sub(r"^importing .*\n|^embedding .*\n|^replaying .*\n", "", result.stderr, flags=re.MULTILINE)
        + result.stdout
    )
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "9c1f7a52-3e0b-5d46-8f21-b7a4c0d5e9f3", text)
    return re.sub(r"\d+\.\d MiB", "0.1 MiB", text)


def test_every_example_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example_files(tmp_path)
    settings, embedder = Settings(home=tmp_path / ".modm"), HashEmbedder()
    cache = ImageCache(
        open_backend(settings), embedder.identity, embedder.dim, settings, ImageStore(settings.image_root)
    )
    served = Served(cache, monkeypatch)
    page = DOC.read_text(encoding="utf-8")
    try:
        blocks = []
        for block in BLOCK.findall(page):
            commands = [line for line in block.splitlines() if line.startswith("$ ")]
            blocks.append("".join(f"{line}\n{run(line)}" for line in commands))
    finally:
        served.stop()
        cache.close()
    fresh = iter(blocks)
    made = BLOCK.sub(lambda _: f"```console\n{next(fresh)}```", page)
    if os.environ.get("MODM_TEST_UPDATE_DOCS"):
        DOC.write_text(made, encoding="utf-8")
    assert made == page
