"""Every relative link and image of the documentation leads somewhere, and every command it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("workers/weights/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?<![\w/.-])modm ([a-z][a-z-]+)(?: ([a-z][a-z-]+))?")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    broken = [
        target
        for target in LINK.findall(text)
        if not target.startswith(("http", "#", "mailto:")) and not (page.parent / target.split("#")[0]).exists()
    ]
    assert broken == []


def commands() -> dict[str, set[str]]:
    from orchestrator.cli import app

    group = typer.main.get_command(app)
    return {name: set(getattr(c, "commands", ())) for name, c in group.commands.items()}  # type: ignore[attr-defined]


def test_every_command_of_the_documentation_exists() -> None:
    known = commands()
    wrong = []
    for page in PAGES:
        code = re.findall(r"`([^`]+)`|^(?:\$ )?(modm .*)$", page.read_text(encoding="utf-8"), flags=re.M)
        for inline, line in code:
            for name, sub in COMMAND.findall(inline or line):
                if name not in known or (sub and known[name] and sub not in known[name]):
                    wrong.append(f"{page.name}: modm {name} {sub}")
    assert wrong == []
