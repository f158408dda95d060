"""The system as a whole: traces over HTTP and direct, deaths of every process, nothing lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from modm_tasks.messages import SubmitRequest
from ops.processes import family
from tests.conftest import SettingsFactory
from tests.support.processes import Processes, run_modm, wait_until
from tests.support.stack import TestStack

pytestmark = pytest.mark.slow

PROMPTS = [f"{colour} {thing} in the {place}" for colour in ("red", "blue") for thing in ("cat", "boat", "tree")
           for place in ("rain", "snow")]  # fmt: skip


def trace(path: Path, prompts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": p, "seed": i}) for i, p in enumerate(prompts)) + "\n")
    return path


def states(stack: TestStack, ids: list[str], *, timeout_s: float = 60) -> list[str]:
    records = [stack.client.get(f"/v1/requests/{i}", wait_s=timeout_s, admitted=True) for i in ids]
    return [r["state"] for r in records]


def send(stack: TestStack, prompts: list[str], **fields: Any) -> list[str]:
    return [stack.client.post("/v1/requests", {"prompt": p} | fields)["id"] for p in prompts]


def test_a_trace_over_http_and_direct_takes_the_same_routes(stack: TestStack, tmp_path: Path) -> None:
    """Closed loop with one user, so that every request finds what the one before it left in the cache."""
    file = trace(tmp_path / "t.jsonl", PROMPTS)
    common = ["submit-trace", str(file), "--concurrency", "1", "--json", "--warm-up", "2"]
    over_http = run_modm(*common, "--namespace", "one", "--report", str(tmp_path / "r"), env=stack.environ)
    assert over_http.returncode == 0, over_http.stderr
    first = json.loads(over_http.stdout)
    assert first["requests"] == {"submitted": 10, "done": 10, "failed": 0, "refused": 0, "cancelled": 0, "lost": 0}
    assert 0 < first["hit_rate"] <= 1
    assert first["clip_score"]["mean"] is not None
    assert (tmp_path / "r" / "contact-sheet.png").is_file()
    held = run_modm(*common, "--direct", "--namespace", "two", env=stack.environ)
    assert held.returncode == 3  # the orchestrator holds the embedded store
    assert "held" in held.stderr or "in use" in held.stderr
    stack.orchestrator.stop()
    direct = run_modm(*common, "--direct", "--namespace", "two", env=stack.environ, timeout_s=120)
    assert direct.returncode == 0, direct.stderr
    second = json.loads(direct.stdout)
    for name in ("hit_rate", "skipped_steps", "refined_by", "requests"):
        assert second[name] == first[name]


def test_ctrl_c_reports_what_was_done(stack: TestStack, tmp_path: Path) -> None:
    file = trace(tmp_path / "t.jsonl", [f"interrupted {i}" for i in range(400)])
    run = stack.processes.modm(
        "submit-trace", str(file), "--policy", "large-only", "--report", str(tmp_path / "r"), name="replay"
    )
    wait_until(lambda: stack.get("/v1/status")["window"].get("done", 0) >= 3, 60, "some requests to be done")
    os.kill(run.pid, signal.SIGINT)
    assert run.popen.wait(30) == 130, run.output()
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["interrupted"] is True
    assert 0 < report["requests"]["done"] < 400
    assert "Traceback" not in run.output()


@pytest.mark.parametrize("victim", ["child", "worker"])
def test_work_of_a_killed_worker_is_done_by_another(
    settings: SettingsFactory, environ: dict[str, str], procs: Processes, victim: str
) -> None:
    """SIGKILL in the middle of a drawing: its lease expires within seconds and the other worker finishes."""
    from tests.support.stack import start_stack

    slow = {"MODM_WORKER__FAKE_LARGE_S": "4", "MODM_WORKER__LEASE_S": "2"}
    env = environ | slow | {"MODM_WORKER__MODE": "pooled", "MODM_EMBEDDER": "fake"}
    stack = start_stack(settings(), env, procs)
    ids = send(stack, ["first", "second", "third"])
    busy = wait_until(
        lambda: next((w for w in stack.get("/v1/status")["workers"] if w["busy_with"] == ids[0]), None),
        30,
        "a busy worker",
    )
    index = int(busy["gpu"])
    if victim == "child":
        os.kill(busy["pid"], signal.SIGKILL)
    else:
        stack.workers[index].kill()
    assert states(stack, ids) == ["done"] * 3
    record = stack.client.get(f"/v1/requests/{ids[0]}")
    assert record["attempt"] == 2
    explained = stack.client.get(f"/v1/requests/{ids[0]}/explain")
    assert any("expired" in t["note"] for t in explained["transitions"])


def test_poison_fails_after_three_attempts_and_others_live(
    settings: SettingsFactory, environ: dict[str, str], procs: Processes
) -> None:
    from tests.support.stack import start_stack

    env = environ | {"MODM_WORKER__LEASE_S": "1", "MODM_WORKER__MODE": "pooled", "MODM_EMBEDDER": "fake"}
    stack = start_stack(settings(), env, procs)
    poison = send(stack, ["[[crash]] everything"])
    good = send(stack, [f"good {i}" for i in range(4)])
    assert states(stack, good, timeout_s=120) == ["done"] * 4
    assert states(stack, poison, timeout_s=120) == ["failed"]
    failed = run_modm("requests", "failed", "--json", env=stack.environ)
    assert "died 3 times" in json.loads(failed.stdout)[0]["error"]
    (broken,) = send(stack, ["[[fail]] politely"])
    assert states(stack, [broken]) == ["failed"]


def test_the_orchestrator_dies_and_comes_back(stack: TestStack) -> None:
    ids = send(stack, [f"before {i}" for i in range(12)], policy="large-only")
    stack.restart_orchestrator()
    assert states(stack, ids) == ["done"] * 12
    wait_until(lambda: stack.get("/v1/status")["counts"]["unadmitted"] == 0, 20, "all images to be admitted")
    assert stack.get("/v1/cache/stats")["namespaces"]["default"]["images"] == 12
    (hit,) = send(stack, ["before 3"])
    assert states(stack, [hit]) == ["done"]
    assert stack.client.get(f"/v1/requests/{hit}")["decision"]["route"] == "small-refine"


def test_the_vector_store_dies_alone_and_nobody_notices(stack: TestStack) -> None:
    """Its process is killed while requests are routed and admitted: the orchestrator starts another."""
    first = send(stack, [f"early {i}" for i in range(6)], policy="large-only")
    assert states(stack, first) == ["done"] * 6
    (store,) = family(stack.orchestrator.pid)
    os.kill(store, signal.SIGKILL)
    ids = send(stack, [f"early {i}" for i in range(6)])
    assert states(stack, ids) == ["done"] * 6
    decisions = [stack.client.get(f"/v1/requests/{i}")["decision"] for i in ids]
    assert {d["route"] for d in decisions} == {"small-refine"}, "what had been acknowledged is found again"
    (another,) = family(stack.orchestrator.pid)
    assert another != store
    assert stack.get("/readyz")["ready"]


def test_lost_messages_and_lost_sources_are_mended(stack: TestStack) -> None:
    """Every token of the broker thrown away, and the source of a hit deleted: both requests end."""
    from modm_tasks.ledger import Ledger

    ledger = Ledger.from_settings(stack.settings)
    ids = send(stack, [f"token {i}" for i in range(10)], policy="large-only")
    ledger.redis.delete("large-gen", "small-refine")
    assert states(stack, ids) == ["done"] * 10
    source = stack.client.get(f"/v1/requests/{ids[0]}")["completion"]["uri"]
    wait_until(lambda: stack.get("/v1/status")["counts"]["unadmitted"] == 0, 20, "all images to be admitted")
    (stack.settings.home / "images" / source).unlink()
    (orphan,) = send(stack, ["token 0"])
    assert states(stack, [orphan]) == ["done"]
    record = stack.client.get(f"/v1/requests/{orphan}")
    assert record["decision"]["route"] == "large-gen"
    assert record["completion"]["model"] == "scenes-large"
    ledger.redis.close()


def test_one_worker_alone_serves_both_routes_under_a_plain_celery_command(
    settings: SettingsFactory, environ: dict[str, str], procs: Processes
) -> None:
    import sys

    from tests.support.stack import start_stack

    env = environ | {"MODM_EMBEDDER": "fake"}
    stack = start_stack(settings(), env, procs, workers=0)
    command = [sys.executable, "-m", "celery", "-A", "modm_tasks.app", "worker", "-n", "gpu0@%h", "-Q"]
    procs.start([*command, "large-gen,small-refine"], name="celery")
    stack.wait_ready(workers=1)
    (miss,) = send(stack, ["a plain worker"])
    assert states(stack, [miss]) == ["done"]
    (hit,) = send(stack, ["a plain worker"])
    assert states(stack, [hit]) == ["done"]
    assert stack.client.get(f"/v1/requests/{hit}")["decision"]["source_id"] is not None


def test_refused_work_says_when_to_come_back(
    settings: SettingsFactory, environ: dict[str, str], procs: Processes
) -> None:
    import httpx

    from tests.support.stack import start_stack

    env = environ | {"MODM_EMBEDDER": "fake", "MODM_SLO__MAX_OPEN_REQUESTS": "3"}
    stack = start_stack(settings(), env, procs, workers=0)
    answers = [httpx.post(f"{stack.url}/v1/requests", json={"prompt": f"p{i}"}, trust_env=False) for i in range(4)]
    assert [a.status_code for a in answers] == [202, 202, 202, 429]
    assert int(answers[3].headers["retry-after"]) >= 1
    assert answers[3].headers["x-should-retry"] == "true"


def test_keys_guard_every_door(settings: SettingsFactory, environ: dict[str, str], procs: Processes) -> None:
    import httpx

    from tests.support.stack import start_stack

    env = environ | {"MODM_EMBEDDER": "fake"}
    made = {c: run_modm("keys", "add", c, env=env).stdout.strip() for c in ("ann", "bob")}
    admin = run_modm("keys", "add", "root", "--scope", "admin", env=env).stdout.strip()
    stack = start_stack(settings(), env | {"MODM_API_KEY": admin}, procs, workers=0)
    assert (settings().home / "keys.json").stat().st_mode & 0o777 == 0o600

    def call(method: str, path: str, key: str | None, **more: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.request(method, stack.url + path, headers=headers, trust_env=False, **more)

    document = httpx.get(f"{stack.url}/openapi.json", trust_env=False).json()
    open_doors = {"/healthz", "/readyz", "/metrics"}
    for path, methods in document["paths"].items():
        for method in methods:
            if path not in open_doors:
                filled = path.replace("{request_id}", "x").replace("{image_id}", "x").replace("{name}", "x")
                assert call(method.upper(), filled, None, json={}).status_code == 401, (method, path)
    body = SubmitRequest(prompt="mine").model_dump(exclude_defaults=True)
    mine = call("POST", "/v1/requests", made["ann"], json=body | {"client": "bob"}).json()
    assert mine["request"]["client"] == "ann"
    assert call("GET", f"/v1/requests/{mine['id']}", made["ann"]).status_code == 200
    assert call("GET", f"/v1/requests/{mine['id']}", made["bob"]).status_code == 404
    assert call("POST", f"/v1/requests/{mine['id']}/cancel", made["bob"]).status_code == 404
    assert call("POST", "/v1/cache/clear", made["ann"], json={}).status_code == 401
    assert call("PUT", "/v1/control", made["ann"], json={"mode": "pooled"}).status_code == 401
    assert call("GET", f"/v1/requests/{mine['id']}", admin).status_code == 200
    run_modm("keys", "revoke", "ann", env=env)
    assert call("GET", f"/v1/requests/{mine['id']}", made["ann"]).status_code == 401


def test_beyond_loopback_without_keys_it_does_not_start(environ: dict[str, str]) -> None:
    done = run_modm("orchestrator", "--host", "0.0.0.0", "--port", "0", env=environ)
    assert done.returncode == 2
    assert "needs API keys" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_replay_through_qdrants_client(
    settings: SettingsFactory, environ: dict[str, str], procs: Processes, tmp_path: Path
) -> None:
    """The other store backend under the same system: routes, cache admin and a restart agree with the embedded one."""
    from tests.support.stack import start_stack

    url = f"local:{tmp_path / 'qdrant'}"
    env = environ | {"MODM_EMBEDDER": "fake", "MODM_WORKER__MODE": "pooled", "MODM_QDRANT_URL": url}
    stack = start_stack(settings(qdrant_url=url), env, procs, workers=1)
    file = trace(tmp_path / "t.jsonl", PROMPTS)
    run = run_modm("submit-trace", str(file), "--concurrency", "1", "--json", env=stack.environ)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["requests"]["done"] == len(PROMPTS)
    assert report["hit_rate"] > 0
    stack.restart_orchestrator()
    assert stack.get("/v1/cache/stats")["namespaces"]["default"]["images"] == len(PROMPTS)
    assert "clean" in run_modm("cache", "verify", env=stack.environ).stdout


def test_a_large_worker_refines_with_the_large_model_under_published_roles(
    settings: SettingsFactory, environ: dict[str, str], procs: Processes
) -> None:
    """Paper, section 4.2: a large worker without misses takes a hit and refines it with its own model, from step k."""
    from modm_tasks.cluster import DesiredRole
    from modm_tasks.ledger import Ledger
    from tests.support.stack import start_stack

    env = environ | {"MODM_EMBEDDER": "fake", "MODM_WORKER__MODE": "roles"}
    stack = start_stack(settings(), env, procs, workers=1)
    ledger = Ledger.from_settings(stack.settings)
    worker = ledger.workers()[0].worker
    ledger.set_desired_role(worker, DesiredRole(role="large", epoch=1))
    (miss,) = send(stack, ["an old stone bridge"])
    assert states(stack, [miss]) == ["done"]
    models = []
    for role in ("large", "small"):
        ledger.set_desired_role(worker, DesiredRole(role=role, epoch=2))  # type: ignore[arg-type]
        (hit,) = send(stack, ["an old stone bridge"])
        assert states(stack, [hit]) == ["done"]
        done = stack.client.get(f"/v1/requests/{hit}")
        assert done["completion"]["steps_run"] == 50 - done["decision"]["skipped_steps"]
        models.append(done["completion"]["model"])
    assert models == ["scenes-large", "scenes-small"]
    ledger.redis.close()
