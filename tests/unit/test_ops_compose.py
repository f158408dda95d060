"""docker-compose.yml, the Dockerfiles and .env.example against the code. No Docker engine is needed."""

from __future__ import annotations

import hashlib
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

SCHEMA_FILE = ROOT / "ops/docker/compose_spec.json"
SCHEMA = json.loads(SCHEMA_FILE.read_text())
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: s for name, s in SERVICES.items() if s["image"].startswith("modm-serving:")}
Validator = jsonschema.Draft201909Validator
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::([?-])([^}]*))?\}")


def seconds(duration: str) -> float:
    return sum(
        float(n) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[u] for n, u in re.findall(r"(\d+)(ms|s|m|h)", duration)
    )


def filled(value: str) -> str:
    """As compose would, with a stand-in for required variables."""
    return VARIABLE.sub(lambda m: m[3] if m[2] == "-" else "secret", value)


def problems(compose: dict[str, Any]) -> list[str]:
    return [f"{'.'.join(map(str, e.path))}: {e.message}" for e in Validator(SCHEMA).iter_errors(compose)]


def changed(**services: dict[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(COMPOSE))
    for name, keys in services.items():
        copy["services"][name] |= keys
    return copy


def test_follows_the_specifications_own_schema() -> None:
    """The schema is the one that Docker publishes, not one of ours: `ops/docker/compose_spec.md` says where it is from."""
    digest = hashlib.sha256(SCHEMA_FILE.read_bytes()).hexdigest()
    assert digest == "0dc04bd346dcfee1b1419628fff79937bbf076925f298f272a2b490e2b112bac"
    assert "docker-compose" in SCHEMA_FILE.with_suffix(".md").read_text()
    Validator.check_schema(SCHEMA)
    assert problems(COMPOSE) == []


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"helthcheck": {}}, "helthcheck"),
        ({"restart": 3}, "restart"),
        ({"depends_on": {"qdrant": {"condition": "service_well"}}}, "depends_on"),
        ({"deploy": {"resources": {"reservations": {"gpus": 1}}}}, "gpus"),
    ],
)
def test_the_schema_refuses_what_compose_would(keys: dict[str, Any], says: str) -> None:
    (problem,) = problems(changed(redis=keys))
    assert says in problem


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


def mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    return [(v.split(":")[0], v.split(":")[1]) for v in service.get("volumes", [])]


def test_volumes_are_declared_used_and_where_the_code_writes() -> None:
    used = {source for s in SERVICES.values() for source, _ in mounts(s)}
    named = {v for v in used if not v.startswith("./")}
    assert named == set(COMPOSE["volumes"])
    assert all((ROOT / v).is_dir() for v in used - named)
    for service in OURS.values():
        text = (ROOT / service["build"]["dockerfile"]).read_text()
        home = re.search(r"MODM_HOME=(\S+)", text)
        assert home is not None
        assert dict(mounts(service)) == {"modm": home[1], "models": "/home/modm/.cache/huggingface"}
        assert service["environment"]["MODM_IMAGE_URL"].startswith(f"{home[1]}/")
        # The folder under a named volume must be there and be modm's, else Docker makes it root's.
        assert f"chown modm:modm /app {home[1]}" in text
        assert "mkdir -p ~/.cache/huggingface" in text.split("USER modm")[1]
    assert SERVICES["grafana"]["volumes"][0].split(":")[0] == "./ops/grafana/provisioning"
    provider = yaml.safe_load((ROOT / "ops/grafana/provisioning/dashboards/modm.yml").read_text())["providers"][0]
    assert provider["options"]["path"] in {target for _, target in mounts(SERVICES["grafana"])}


def test_published_ports_are_loopback_are_listened_on_and_need_a_secret() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert set(published) == {"orchestrator", "flower", "grafana"}
    for name, (port,) in published.items():
        address, outer, inner = port.split(":")
        assert (address, outer) == ("127.0.0.1", inner)
        if name in OURS:
            command = OURS[name]["command"]
            assert command[command.index("--port") + 1] == inner
    for name, key in (("flower", "FLOWER_BASIC_AUTH"), ("grafana", "GF_SECURITY_ADMIN_PASSWORD")):
        assert ":?" in SERVICES[name]["environment"][key], f"{name} would open without a secret"
    # The orchestrator refuses to listen beyond loopback without keys, unless MODM_API__ALLOW_OPEN says so.
    assert "MODM_API__ALLOW_OPEN" not in TEXT


def test_addresses_inside_are_services_and_their_ports() -> None:
    """Every host in a URL of the file is a service; redis and qdrant listen on their standard ports."""
    hosts = set(re.findall(r"(?:redis://\S*@|http://)([a-z-]+):(\d+)", filled(TEXT)))
    assert hosts == {("redis", "6379"), ("qdrant", "6333")}
    assert set(SERVICES) >= {host for host, _ in hosts}


def test_variables_that_are_not_settings_are_read_by_somebody() -> None:
    read_by = {
        "HF_TOKEN": "huggingface_hub/utils/_auth.py",
        "CUDA_VISIBLE_DEVICES": "workers/pinning.py",
        "HIP_VISIBLE_DEVICES": "workers/pinning.py",
        "FLOWER_BASIC_AUTH": "ops/flower/command.py",
        "REMAP_SIGTERM": "celery/concurrency/prefork.py",
    }
    used = {key for s in OURS.values() for key in s["environment"] if not key.startswith("MODM_")}
    assert used == set(read_by)
    libraries = Path(yaml.__file__).parents[1]
    for name, file in read_by.items():
        path = ROOT / file if (ROOT / file).is_file() else libraries / file
        found = path.read_text() if path.is_file() else ""
        assert name in found, f"{file} does not read {name}"


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
    assert required == {"REDIS_PASSWORD", "QDRANT_API_KEY", "FLOWER_BASIC_AUTH", "GRAFANA_PASSWORD"}
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
