"""One self-contained HTML page. Everything that came from a user is escaped; images are data URIs; nothing is loaded."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from orchestrator.report import tables

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
thead th { border-bottom-width: 2px; } tbody th { font-weight: 500; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
figcaption { color: #333; font-size: .85rem; } img { max-width: 100%; height: auto; display: block; margin: auto; }
details { margin-top: 1rem; } pre { background: var(--soft); padding: .8rem; overflow: auto; border-radius: 6px; }
.lead { font-size: 1.1rem; } .wide { overflow-x: auto; }
"""
#: Nothing is fetched and nothing runs, whatever a prompt may hold.
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def page(
    title: str,
    reports: Sequence[Mapping[str, Any]],
    plots: Mapping[str, bytes],
    *,
    sheets: Mapping[str, bytes] | None = None,
    lead: str = "",
) -> str:
    """The page as text. ``sheets``: the contact sheet of each run, by its name."""
    head = "".join(f"<th>{escape(n)}</th>" for n in tables.names(reports))
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in tables.rows(reports)
    )
    figures = "".join(
        f'<figure><img alt="{escape(name)}" src="{_data_uri(png)}"><figcaption>{escape(name)}</figcaption></figure>'
        for name, png in plots.items()
    )
    contact = "".join(
        f"<h2>Contact sheet: {escape(name)}</h2><p>Prompt, cached source image, refined image.</p>"
        f'<figure><img alt="contact sheet" src="{_data_uri(sheet)}"></figure>'
        for name, sheet in (sheets or {}).items()
    )
    machines = [json.dumps(r["machine"], indent=1, default=str) for r in reports]
    machine = escape("\n".join(dict.fromkeys(machines)))  # once, where all ran on the same
    settings = escape(json.dumps([r["settings"] for r in reports], indent=1, default=str))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<h2>Plots</h2><div class="plots">{figures}</div>{contact}'
        f"<details><summary>Machine</summary><pre>{machine}</pre></details>"
        f"<details><summary>Settings</summary><pre>{settings}</pre></details></body></html>\n"
    )
