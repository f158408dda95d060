"""docker-compose.yml, the Dockerfiles and .env.example against the code. No Docker engine is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml

from modm_tasks.settings import Settings, load_settings, unknown_environment
from tests.support.processes import ROOT

SCHEMA = json.loads((ROOT / "tests/support/compose_schema.json").read_text())
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: s for name, s in SERVICES.items() if s["image"].startswith("modm-serving:")}
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::([?-])([^}]*))?\}")


def seconds(duration: str) -> float:
    return sum(
        float(n) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[u] for n, u in re.findall(r"(\d+)(ms|s|m|h)", duration)
    )


def filled(value: str) -> str:
    """As compose would, with a stand-in for required variables."""
    return VARIABLE.sub(lambda m: m[3] if m[2] == "-" else "secret", value)


def test_follows_the_schema() -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(COMPOSE)


def test_schema_refuses_a_misspelt_key() -> None:
    wrong = json.loads(json.dumps(COMPOSE))
    wrong["services"]["redis"]["helthcheck"] = {}
    with pytest.raises(jsonschema.ValidationError, match="helthcheck"):
        jsonschema.Draft202012Validator(SCHEMA).validate(wrong)


def test_laptop_profile_has_the_whole_system() -> None:
    default = {name for name, s in SERVICES.items() if not s.get("profiles") or "cpu" in s["profiles"]}
    assert default == {"redis", "qdrant", "orchestrator", "controller", "worker-cpu-0", "worker-cpu-1", "flower"}
    assert "COMPOSE_PROFILES=cpu\n" in (ROOT / ".env.example").read_text()


@pytest.mark.parametrize("name", sorted(OURS))
def test_command_exists(name: str) -> None:
    """Every command parses as it stands: sub-commands, options and values."""
    from orchestrator.cli import app

    command: Any = typer.main.get_command(app)
    args = list(OURS[name]["command"])
    context = command.make_context("modm", list(args), resilient_parsing=True)
    while hasattr(command, "commands"):
        assert args[0] in command.commands, f"{name}: no command {args[0]!r}"
        command = command.commands[args.pop(0)]
    command.make_context(name, args, parent=context)


@pytest.mark.parametrize("name", sorted(OURS))
def test_settings_exist_and_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {k: filled(v) for k, v in OURS[name]["environment"].items()}
    assert unknown_environment(environ) == []
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    settings = load_settings()
    assert settings.qdrant_url == "http://qdrant:6333"
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == "redis://:secret@redis:6379/0"


@pytest.mark.parametrize("name", sorted(OURS))
def test_health_check_runs_our_code(name: str) -> None:
    from ops.health import main

    _, python, dash, module, what, target = OURS[name]["healthcheck"]["test"]
    assert (python, dash, module) == ("python", "-m", "ops.health")
    if what == "worker":
        assert target == f"gpu{OURS[name]['command'][2]}@%h"
    else:
        port = re.search(r":(\d+)/", target)
        assert port is not None
        assert port[1] in OURS[name]["command"], "the check asks the port that the command opens"
    with pytest.raises(SystemExit):
        main(["nonsense", target])


def test_grace_exceeds_the_soft_shutdown() -> None:
    for name, service in OURS.items():
        if name.startswith("worker"):
            soft_s = float(service["environment"]["MODM_WORKER__SOFT_SHUTDOWN_S"])
            assert seconds(service["stop_grace_period"]) > soft_s + 10
            assert service["environment"]["REMAP_SIGTERM"] == "SIGQUIT"


def test_volumes_are_declared_and_used() -> None:
    used = {v.split(":")[0] for s in SERVICES.values() for v in s.get("volumes", [])}
    named = {v for v in used if not v.startswith("./")}
    assert named == set(COMPOSE["volumes"])
    assert all((ROOT / v).is_dir() for v in used - named)


def test_variables_are_in_the_example() -> None:
    example = dict(
        line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if re.match(r"\w+=", line)
    )
    in_compose = {m[1] for m in VARIABLE.finditer(TEXT)}
    assert in_compose == set(example) - {"COMPOSE_PROFILES"}
    ours = {k: v for k, v in example.items() if k.startswith("MODM_")}
    assert unknown_environment(ours) == []
    for key, value in ours.items():
        assert value == str(getattr(Settings.model_construct(), key.removeprefix("MODM_").lower()))


def test_secrets_are_required_and_not_written_down() -> None:
    required = {m[1] for m in VARIABLE.finditer(TEXT) if m[2] == "?"}
    assert required == {"REDIS_PASSWORD", "QDRANT_API_KEY", "FLOWER_BASIC_AUTH"}
    assert "requirepass" in SERVICES["redis"]["command"]
    assert "noeviction" in SERVICES["redis"]["command"]
    assert "MODM_API__KEYS_FILE" in SERVICES["orchestrator"]["environment"]


def test_each_gpu_worker_has_a_device_of_its_own() -> None:
    for kind in ("nvidia", "rocm"):
        workers = [s for n, s in SERVICES.items() if n.startswith(f"worker-{kind}")]
        assert len({s["command"][2] for s in workers}) == len(workers) == 2
        assert len({s["hostname"] for s in workers}) == 2
    devices = [
        s["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for n, s in SERVICES.items()
        if n.startswith("worker-nvidia")
    ]
    assert devices == [["0"], ["1"]]


@pytest.mark.parametrize("path", sorted(Path(ROOT, "ops/docker").glob("*.Dockerfile")), ids=lambda p: p.stem)
def test_dockerfile(path: Path) -> None:
    lines = path.read_text().splitlines()
    user = lines.index("USER modm")
    assert all(i > user for i, line in enumerate(lines) if line.startswith(("COPY", "ENTRYPOINT"))), "runs as root"
    assert 'ENTRYPOINT ["modm"]' in lines
    assert any("ops/setup.sh" in line for line in lines)
    assert any(s["build"]["dockerfile"] == f"ops/docker/{path.name}" for s in OURS.values())


def test_prometheus_asks_ports_that_are_open() -> None:
    config = yaml.safe_load((ROOT / "ops/prometheus/prometheus.yml").read_text())
    for job in config["scrape_configs"]:
        host, port = job["static_configs"][0]["targets"][0].split(":")
        assert port in SERVICES[host]["command"]
    assert all((ROOT / "ops/prometheus" / f).is_file() for f in config["rule_files"])
