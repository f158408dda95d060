"""Every series that the Grafana dashboard and the alert rules name is scraped from a running stack."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from modm_tasks.client import Client
from ops.redis_server import free_port
from tests.support.processes import ROOT, wait_until
from tests.support.stack import TestStack

NAME = re.compile(r"\bmodm_[a-z_]+\b")


def dashboard_expressions() -> Iterator[str]:
    dashboard = json.loads((ROOT / "ops/grafana/dashboards/modm.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def alert_expressions() -> Iterator[str]:
    for group in yaml.safe_load((ROOT / "ops/prometheus/alerts.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def series(text: str) -> dict[str, set[str]]:
    """Names of samples to their labels; of families that have no sample yet, the names they will have."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        for suffix in suffixes:
            found.setdefault(family.name + suffix, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.slow
def test_every_series_is_there(stack: TestStack) -> None:
    port = free_port()
    stack.processes.modm("controller", "run", "--metrics-port", str(port), name="controller")
    url = f"http://127.0.0.1:{port}/metrics"

    def leads() -> str:
        try:
            text = httpx.get(url, timeout=5, trust_env=False).text
        except httpx.TransportError:
            return ""
        return text if "modm_controller_leading 1.0" in text and "modm_workers{" in text else ""

    wait_until(leads, 30, "the controller to lead and to see the workers")
    with Client(stack.url) as client:
        for prompt in ("a red circle", "a red circle on blue"):  # a miss, then a hit
            record = client.post("/v1/requests", json={"prompt": prompt})
            done = client.get(f"/v1/requests/{record['id']}", wait_s=30, admitted=True)
            assert done["state"] == "done"
    ours = httpx.get(f"{stack.url}/metrics", timeout=10, trust_env=False).text
    assert "red circle" not in ours, "prompts have no place in metrics"
    found = series(ours)
    for name, labels in series(leads()).items():
        found.setdefault(name, set()).update(labels)
    assert found["modm_routed_total"] == {"route", "policy"}

    expressions = [*dashboard_expressions(), *alert_expressions()]
    named = {name for expression in expressions for name in NAME.findall(expression)}
    assert len(named) > 30
    assert named - set(found) == set()
    for expression in expressions:
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            for label in {part.strip() for part in labels.split(",")} - {"le"}:
                names = NAME.findall(expression)
                assert any(label in found[name] or not found[name] for name in names), f"{expression}: no label {label}"
