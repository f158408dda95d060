"""What stands between a fault, or a stranger, and the promise: watchdogs that meet, full and slow stores, clients that
leave, clients that must not see each other, workers told to stop, and Redis over TLS.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from modm_tasks.app import make_app
from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Completion, Decision, Route, State, SubmitRequest, new_request_id
from modm_tasks.redis_client import connect
from modm_tasks.settings import Settings, load_settings
from ops.redis_server import RunningRedis, start_redis
from orchestrator.limits import RoutingWatch, health_problems, redis_problem
from orchestrator.tokens import Tokens
from orchestrator.watchdog import Watchdog
from tests.conftest import SettingsFactory, child_environment, fresh_database
from tests.support.processes import Processes, processes, run_modm, wait_until
from tests.support.stack import TestStack, start_stack

# --- two watchdogs --------------------------------------------------------------------------------------------------


class Noted:
    """Stands for pipeline and admission, which have tests of their own: notes what a watchdog hands over."""

    open_requests: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda request_id="", **_: self.calls.append(f"{name} {request_id}")


def completion() -> Completion:
    return Completion(
        uri="", width=64, height=64, seed=1, model="m", steps_run=1, skipped_steps=0, depth=0, gpu_s=0.1, vector="",
        embedder="e",
    )  # fmt: skip


def test_two_watchdogs_of_one_ledger_do_each_thing_once(settings: SettingsFactory, tmp_path: Path) -> None:
    ours = settings()
    ledgers = [Ledger.from_settings(ours) for _ in range(2)]
    first = ledgers[0]
    store = ImageStore(str(tmp_path / "images"))
    ids = [new_request_id() for _ in range(40)]
    for request_id in ids:
        first.accept(request_id, SubmitRequest(prompt="p"))
        first.route(request_id, Decision(route=Route.LARGE_GEN, policy="modm"))
        assert first.claim("large-gen", "gone", lease_s=0.01) is not None
    with make_app(ours) as app:
        app.control.purge()
        noted: list[Any] = [Noted(), Noted()]
        dogs = [
            Watchdog(ledger, Tokens(app, ledger), n, n, n, store, stale_s=0.0)
            for ledger, n in zip(ledgers, noted, strict=True)
        ]
        with ThreadPoolExecutor(2) as pool:
            for _ in range(4):
                list(pool.map(lambda dog: dog.look(), dogs))
    expired = [note for i in ids for _, _, note in first.log(i) if "expired" in note]
    assert len(expired) == len(ids)
    assert {r.state for r in first.get_many(ids)} == {State.QUEUED}
    assert first.window(window_s=60, bucket_s=10, now_s=first.now_s())["retries"] == len(ids)
    # At least one token for each; twice as many would do no harm, as a claim finds nothing then.
    assert len(ids) <= first.list_length("large-gen") <= 2 * len(ids)
    claimed = [r.id for r in iter(lambda: first.claim("large-gen", "w", lease_s=60), None)]
    assert sorted(claimed) == sorted(ids)
    for request_id in claimed:
        first.finish(request_id, 2, completion())
    for dog in dogs:
        dog.look()
    puts = [sorted(call for call in n.calls if call.startswith("put ")) for n in noted]
    assert puts == 2 * [sorted(f"put {i}" for i in ids)]
    assert [first.admitted(ids[0], None), ledgers[1].admitted(ids[0], None)] == [True, False]
    for ledger in ledgers:
        ledger.redis.close()


# --- stores that are full, slow or away -----------------------------------------------------------------------------


def test_a_redis_near_its_maxmemory_stops_admission_before_writes_fail(tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis")
    try:
        ours = load_settings(redis_url=server.url, home=tmp_path)
        ledger = Ledger.from_settings(ours)
        assert redis_problem(ledger) is None
        ledger.redis.set("filler", "x" * 20_000_000)
        used = int(ledger.redis.info("memory")["used_memory"])
        ledger.redis.config_set("maxmemory", int(used * 1.03))
        problems = health_problems(ours, ledger)()
        assert len(problems) == 1
        assert "maxmemory" in problems[0]
        ledger.accept(new_request_id(), SubmitRequest(prompt="p"))  # what is under way can still be written
        ledger.redis.config_set("maxmemory", used * 10)
        assert health_problems(ours, ledger)() == []
        ledger.redis.close()
    finally:
        server.stop()


def test_routing_that_stands_still_is_told_from_a_burst() -> None:
    watch = RoutingWatch(still_s=10.0)
    assert watch.problem(None, 0) is None
    assert [watch.problem(f"id-{second}", second) for second in range(60)] == [None] * 60
    assert watch.problem("stuck", 60) is None
    assert watch.problem("stuck", 69.9) is None
    assert "nothing was routed for 10 s" in str(watch.problem("stuck", 70))
    assert watch.problem("next", 71) is None
    assert watch.problem(None, 90) is None


# --- a stack behind TLS, with clients that do not share ------------------------------------------------------------


@contextmanager
def tls_proxy(folder: Path, port: int) -> Iterator[tuple[int, Path]]:
    """(port, certificate) of a TLS door before a plain Redis, as stunnel or a managed service has it."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]  # fmt: skip
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    started: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = []
    up = threading.Event()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except (ConnectionError, ssl.SSLError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    async def serve() -> None:
        end = asyncio.Event()
        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
        started.append((server.sockets[0].getsockname()[1], asyncio.get_running_loop(), end))
        up.set()
        await end.wait()
        server.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert up.wait(10)
    proxy_port, loop, end = started[0]
    try:
        yield proxy_port, certificate
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(10)


@pytest.fixture(scope="module")
def guarded_stack(
    redis_server: RunningRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TestStack, dict[str, str]]]:
    """(stack, keys by client): Redis over TLS, keys for two clients and an administrator, images not shared."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    home = tmp_path_factory.mktemp("guarded")
    plain = fresh_database(redis_server)
    with tls_proxy(home, redis_server.plan.port) as (port, certificate):
        url = plain.replace("redis://", "rediss://").replace(f":{redis_server.plan.port}/", f":{port}/")
        url += f"?ssl_ca_certs={certificate}"
        env = child_environment(url, home) | {
            "MODM_WORKER__MODE": "pooled",
            "MODM_EMBEDDER": "fake",
            "MODM_CACHE__SCOPE": "per-client",
            "MODM_API__ON_DISCONNECT": "cancel",
            "MODM_WORKER__FAKE_LARGE_S": "1.5",
        }
        keys = {client: run_modm("keys", "add", client, env=env).stdout.strip() for client in ("ann", "bob")}
        keys["root"] = run_modm("keys", "add", "root", "--scope", "admin", env=env).stdout.strip()
        with processes(home / "logs", env) as group:
            settings: Settings = load_settings(redis_url=plain, home=home)
            yield start_guarded(settings, env, group, keys["root"]), keys


def start_guarded(settings: Settings, env: dict[str, str], group: Processes, key: str) -> TestStack:
    stack = start_stack(settings, env, group, workers=0)
    for _ in range(2):
        stack.add_worker()
    ledger = Ledger.from_settings(settings)
    wait_until(lambda: len(ledger.workers()) == 2, 60, "two workers behind TLS")
    ledger.redis.close()
    return stack


def as_client(stack: TestStack, key: str) -> httpx.Client:
    return httpx.Client(base_url=stack.url, headers={"authorization": f"Bearer {key}"}, timeout=30, trust_env=False)


def drawn(http: httpx.Client, **body: Any) -> dict[str, Any]:
    accepted = http.post("/v1/requests", json=body)
    assert accepted.status_code == 202, accepted.text
    record: dict[str, Any] = http.get(
        f"/v1/requests/{accepted.json()['id']}", params={"wait_s": 20, "admitted": True}
    ).json()
    assert record["state"] == "done", record
    return record


@pytest.mark.slow
def test_clients_that_do_not_share_see_nothing_of_each_other(guarded_stack: tuple[TestStack, dict[str, str]]) -> None:
    """Over Redis with TLS throughout."""
    stack, keys = guarded_stack
    prompt = "a red cat on a blue sofa in the evening"
    with (
        as_client(stack, keys["ann"]) as ann,
        as_client(stack, keys["bob"]) as bob,
        as_client(stack, keys["root"]) as root,
    ):
        mine = drawn(ann, prompt=prompt)
        again = drawn(ann, prompt=prompt)
        assert again["decision"]["source_id"] == mine["id"]
        other = drawn(bob, prompt=prompt)
        assert (other["decision"]["route"], other["decision"]["source_id"]) == ("large-gen", None)
        assert bob.get(f"/v1/requests/{mine['id']}/image").status_code == 404
        assert {r["id"] for r in bob.get("/v1/requests", params={"client": "ann"}).json()} == {other["id"]}
        document = httpx.get(f"{stack.url}/openapi.json", trust_env=False).json()
        own = ("/v1/cache/entries", "/v1/cache/search")
        for path, methods in document["paths"].items():
            for method in methods if path.startswith("/v1/cache") else ():
                answer = bob.request(method.upper(), path.replace("{image_id}", mine["id"]), json={"text": prompt})
                assert (answer.status_code == 401) is not path.startswith(own), (method, path)
        assert bob.get(f"/v1/cache/entries/{mine['id']}/image").status_code == 404
        for caller, names in ((ann, {"ann"}), (bob, {"bob"}), (root, {"ann", "bob"})):
            listed = caller.get("/v1/cache/entries").json()["entries"]
            found = caller.post("/v1/cache/search", json={"text": prompt, "limit": 10}).json()["matches"]
            assert {e["client"] for e in listed} == {e["client"] for e in found} == names


@pytest.mark.slow
def test_a_client_that_hangs_up_has_its_request_cancelled_where_that_is_the_policy(
    guarded_stack: tuple[TestStack, dict[str, str]],
) -> None:
    stack, keys = guarded_stack
    with as_client(stack, keys["ann"]) as ann:
        with pytest.raises(httpx.ReadTimeout):
            ann.post("/v1/images/generations", json={"prompt": "an abandoned green house", "n": 3}, timeout=0.7)

        def states() -> list[str]:
            rows = ann.get("/v1/requests", params={"limit": 50}).json()
            return [r["state"] for r in rows if r["request"]["prompt"] == "an abandoned green house"]

        wait_until(lambda: len(states()) == 3 and set(states()) <= {"done", "cancelled"}, 20, "the abandoned to end")
        assert "cancelled" in states()


@pytest.mark.slow
@pytest.mark.parametrize(("grace_s", "note"), [("3", ""), ("0.2", "given back")])
def test_a_worker_told_to_stop_finishes_or_gives_back_what_it_holds(
    guarded_stack: tuple[TestStack, dict[str, str]], grace_s: str, note: str
) -> None:
    """As the Compose file sets it up: TERM means QUIT, with a grace for what is being drawn."""
    stack, keys = guarded_stack
    ledger = Ledger.from_settings(stack.settings)
    env = {"REMAP_SIGTERM": "SIGQUIT", "MODM_WORKER__SOFT_SHUTDOWN_S": grace_s}
    worker = stack.add_worker(env=env)
    mine = f"gpu{len(stack.workers) - 1}@"
    wait_until(lambda: any(w.worker.startswith(mine) for w in ledger.workers()), 60, "one more worker")
    with as_client(stack, keys["bob"]) as bob:
        ids = [bob.post("/v1/requests", json={"prompt": f"stop {n}", "cache": "bypass"}).json()["id"] for n in range(6)]
        running = wait_until(
            lambda: [r.id for r in ledger.get_many(ids) if r.state is State.RUNNING and str(r.worker).startswith(mine)],
            20, "it to draw",
        )  # fmt: skip
        worker.popen.send_signal(signal.SIGTERM)
        worker.popen.wait(35)
        records = [bob.get(f"/v1/requests/{i}", params={"wait_s": 20}).json() for i in ids]
    assert [r["state"] for r in records] == ["done"] * len(ids)
    notes = [text for _, _, text in ledger.log(running[0])]
    assert not [text for text in notes if "expired" in text]
    assert [text for text in notes if text == "given back"] == ([note] if note else [])
    ledger.redis.close()


def test_a_tls_address_is_checked_against_its_certificate(redis_server: RunningRedis, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    with tls_proxy(tmp_path, redis_server.plan.port) as (port, certificate):
        address = redis_server.url.replace("redis://", "rediss://").replace(f":{redis_server.plan.port}/", f":{port}/")
        trusting = Ledger(connect(f"{address}?ssl_ca_certs={certificate}"))
        assert trusting.now_s() > 0
        trusting.redis.close()
        from modm_tasks.errors import UnavailableError

        stranger = Ledger(connect(address))
        with pytest.raises(UnavailableError, match="certificate"):
            stranger.now_s()
        stranger.redis.close()
