"""Pages and files that are made from the code, or say something that the code can check."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import typer.main
import yaml

from ops import docs_settings
from tests.support.processes import ROOT

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])


def test_settings_page_is_current() -> None:
    assert docs_settings.main(["--check"]) == 0, "run `make docs`"


def test_settings_page_names_limits_and_hides_nothing() -> None:
    page = docs_settings.render()
    assert "| `api.port` | `MODM_API__PORT` | `8000` | integer, >= 0, <= 65535 |" in page
    assert "`MODM_REDIS_URL`" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_code_blocks_exist(page: Path) -> None:
    """Every `modm ...` line of a shell block names a command, and options that it has."""
    from orchestrator.cli import app

    root = typer.main.get_command(app)
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.strip().removeprefix("$ ").split("#")[0].split()
            while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
                words.pop(0)
            if words[:1] == ["modm"]:
                check_command(root, words[1:], f"{page.name}: {line}")


def check_command(command: object, words: list[str], where: str) -> None:
    while words and (commands := getattr(command, "commands", None)):
        if words[0].startswith("-"):
            break
        assert words[0] in commands, f"{where}: no command {words[0]!r}"
        command = commands[words.pop(0)]
    known = {option for p in getattr(command, "params", []) for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    for word in words:
        if re.match(r"--[a-z]", word):
            assert word.split("=")[0] in known, f"{where}: no option {word}"


TARGETS = [
    *("setup", "test", "lint", "type", "demo", "down", "train-scenes", "eval-scenes"),
    *("bench", "bench-gpu", "chaos", "docs", "clean"),
]


@pytest.mark.parametrize("target", TARGETS)
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_same_commands() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert all(f"make {target}" in script for target in ("setup", "lint", "type", "test"))
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert any(step.get("run") == "bash .ci/run" for step in steps)
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in steps if "uses" in step)
