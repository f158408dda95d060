"""The HTTP API over real processes: orchestrator, two pooled workers with the fake engine, Redis."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from modm_tasks.errors import ConflictError, InvalidInputError, NotFoundError
from modm_tasks.messages import MAX_PROMPT_CHARS, new_request_id
from tests.support.processes import run_modm
from tests.support.stack import TestStack

pytestmark = pytest.mark.slow


@pytest.fixture
def http(module_stack: TestStack) -> Any:
    with httpx.Client(base_url=module_stack.url, timeout=60, trust_env=False) as client:
        yield client


def submit(http: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/requests", json={"prompt": prompt} | fields)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def finish(http: httpx.Client, request_id: str, *, admitted: bool = True) -> dict[str, Any]:
    return dict(http.get(f"/v1/requests/{request_id}", params={"wait_s": 30, "admitted": admitted}).json())


def test_a_miss_then_a_hit_refined_from_it(http: httpx.Client) -> None:
    miss = finish(http, submit(http, "one red barn on a hill", namespace="story")["id"])
    assert miss["state"] == "done"
    assert miss["decision"]["route"] == "large-gen"
    assert miss["clip_score"] == pytest.approx(1.0, abs=1e-3)
    hit = finish(http, submit(http, "one red barn on a hill at night", namespace="story")["id"])
    assert hit["decision"]["route"] == "small-refine"
    assert hit["decision"]["source_id"] == miss["id"]
    assert hit["completion"]["model"] == "scenes-small"
    assert hit["completion"]["steps_run"] == 50 - hit["decision"]["skipped_steps"]
    assert hit["completion"]["depth"] == 1
    source = http.get(f"/v1/requests/{hit['id']}/source")
    assert source.content == http.get(f"/v1/requests/{miss['id']}/image").content
    explained = http.get(f"/v1/requests/{hit['id']}/explain").json()
    assert [t["state"] for t in explained["transitions"]] == ["accepted", "queued", "running", "done"]


def test_namespaces_do_not_meet(http: httpx.Client) -> None:
    finish(http, submit(http, "a lone tower", namespace="left")["id"])
    other = finish(http, submit(http, "a lone tower", namespace="right")["id"])
    assert other["decision"]["route"] == "large-gen"


@pytest.mark.parametrize(
    ("mode", "route", "cached"),
    [("auto", "small-refine", True), ("bypass", "large-gen", True), ("refresh", "large-gen", True),
     ("no-store", "small-refine", False)],
)  # fmt: skip
def test_cache_modes(http: httpx.Client, mode: str, route: str, cached: bool) -> None:
    space = f"mode-{mode}"
    finish(http, submit(http, "a green boat", namespace=space)["id"])
    record = finish(http, submit(http, "a green boat", namespace=space, cache=mode)["id"])
    assert record["decision"]["route"] == route
    images = http.get("/v1/cache/stats").json()["namespaces"][space]["images"]
    assert images == (2 if cached else 1)


def test_policies(http: httpx.Client) -> None:
    finish(http, submit(http, "blue door", namespace="pol")["id"])
    large = finish(http, submit(http, "blue door", namespace="pol", policy="large-only")["id"])
    small = finish(http, submit(http, "yellow door", namespace="pol", policy="small-only")["id"])
    assert large["completion"]["model"] == "scenes-large"
    assert (small["completion"]["model"], small["completion"]["steps_run"]) == ("scenes-small", 50)


def test_the_openai_form(http: httpx.Client) -> None:
    body = {"prompt": "a quiet lake", "n": 2, "size": "64x64", "response_format": "b64_json", "output_format": "jpeg"}
    answer = http.post("/v1/images/generations", json=body).json()
    assert len(answer["data"]) == 2
    for item in answer["data"]:
        with Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) as image:
            assert (image.format, image.size) == ("JPEG", (64, 64))
    url = http.post("/v1/images/generations", json={"prompt": "a quiet lake"}).json()["data"][0]["url"]
    assert http.get(url).headers["content-type"] == "image/png"


def test_the_same_seed_gives_the_same_bytes(http: httpx.Client) -> None:
    ids = [submit(http, "a seeded hill", seed=7, cache="bypass", namespace=f"seed{i}")["id"] for i in range(2)]
    first, second = (http.get(f"/v1/requests/{finish(http, i)['id']}/image").content for i in ids)
    assert first == second


def test_an_idempotency_key_makes_one_request(http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "once"}
    answers = [http.post("/v1/requests", json={"prompt": "once"}, headers=headers).json()["id"] for _ in range(3)]
    assert len(set(answers)) == 1


def test_events_end_with_the_request(http: httpx.Client) -> None:
    request_id = submit(http, "events of a bridge", namespace="ev")["id"]
    with http.stream("GET", f"/v1/requests/{request_id}/events") as stream:
        names = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event: ")]
    assert names[-1] == "done"
    assert names == sorted(names, key=["accepted", "queued", "running", "done"].index)


def test_a_batch_is_accepted_in_order(http: httpx.Client) -> None:
    rows = [{"prompt": f"batch {i}", "namespace": "batch"} for i in range(5)]
    records = http.post("/v1/requests/batch", json={"requests": rows}).json()
    assert [r["request"]["prompt"] for r in records] == [r["prompt"] for r in rows]
    assert all(finish(http, r["id"])["state"] == "done" for r in records)


def test_cancel(http: httpx.Client) -> None:
    ids = [submit(http, f"crowd {i}", namespace="crowd", policy="large-only")["id"] for i in range(8)]
    answer = http.post(f"/v1/requests/{ids[-1]}/cancel").json()
    assert answer["state"] in {"cancelled", "running"}
    assert finish(http, ids[-1], admitted=False)["state"] == "cancelled"
    assert http.post(f"/v1/requests/{ids[-1]}/cancel").status_code == 409
    assert http.get(f"/v1/requests/{ids[-1]}/image").status_code == 409
    assert all(finish(http, i)["state"] == "done" for i in ids[:-1])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "x" * (MAX_PROMPT_CHARS + 1)}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a\u0000b"}, "prompt"),
        ({"prompt": "a", "size": "100000x8"}, "size"),
        ({"prompt": "a", "size": "63x64"}, "size"),
        ({"prompt": "a", "num_inference_steps": 900}, "num_inference_steps"),
        ({"prompt": "a", "policy": "psychic"}, "policy"),
        ({"prompt": "a", "features": "telepathy"}, "features"),
        ({"prompt": "a", "namespace": "../x"}, "namespace"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "sneed": 1}, "sneed"),
    ],
)
def test_bad_input_names_the_field(http: httpx.Client, body: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/requests", json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["field"] == field
    assert "\n" not in error["message"]
    assert answer.headers["x-should-retry"] == "false"


def test_bad_json_and_unknown_ids(http: httpx.Client) -> None:
    broken = http.post("/v1/requests", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 422
    for path in ("", "/image", "/explain", "/events", "/source"):
        assert http.get(f"/v1/requests/{new_request_id()}{path}").status_code == 404


def test_status_health_and_metrics(http: httpx.Client) -> None:
    finish(http, submit(http, "metrics of a mill")["id"])
    assert http.get("/readyz").json() == {"ready": True, "problems": [], "workers": 2}
    status = http.get("/v1/status").json()
    assert len(status["workers"]) == 2
    assert status["window"]["done"] >= 1
    text = http.get("/metrics").text
    names = (
        "modm_hit_rate",
        "modm_queue_depth",
        "modm_latency_seconds_bucket",
        "modm_workers_ready 2.0",
        "modm_up 1.0",
    )
    for name in names:
        assert name in text
    assert "mill" not in text  # no prompts in metrics
    assert http.get("/openapi.json").json()["info"]["title"] == "MoDM serving"


def test_prompts_that_arrive_together_are_all_served(http: httpx.Client) -> None:
    with ThreadPoolExecutor(16) as pool:
        fields = {"namespace": "tog", "policy": "modm-plus"}
        ids = list(pool.map(lambda i: submit(http, f"together {i}", **fields)["id"], range(40)))
    records = [finish(http, i) for i in ids]
    assert {r["state"] for r in records} == {"done"}
    assert len({r["completion"]["uri"] for r in records}) == 40


def test_in_flight_reuse_waits_and_then_refines(module_stack: TestStack, http: httpx.Client) -> None:
    """Copies of one unseen prompt at once: the first is drawn, the others wait for it instead of drawing it again."""
    fields = {"namespace": "fl", "features": "inflight,late-binding"}
    ids = [submit(http, "a striped lighthouse far away", **fields)["id"] for _ in range(6)]
    records = [finish(http, i) for i in ids]
    drawn = [r for r in records if r["decision"]["route"] == "large-gen"]
    assert len(drawn) < 6
    refined = [r for r in records if r["decision"]["source_id"]]
    assert refined
    assert all(r["completion"]["depth"] >= 1 for r in refined)


def test_an_exact_repeat_with_the_same_seed_is_the_stored_image(http: httpx.Client) -> None:
    fields = {"namespace": "rep", "seed": 11, "features": "repeats"}
    first = finish(http, submit(http, "a white gate", **fields)["id"])
    again = finish(http, submit(http, "a white gate", **fields)["id"])
    assert again["decision"]["route"] == "stored"
    assert again["completion"]["uri"] == first["completion"]["uri"]
    assert again["completion"]["steps_run"] == 0
    varied = finish(http, submit(http, "a white gate", namespace="rep", features="repeats")["id"])
    assert varied["decision"]["route"] == "small-refine"


def test_explain_tells_of_waiting_and_of_a_second_drawing(module_stack: TestStack, http: httpx.Client) -> None:
    env, far = module_stack.environ, {"deadline_s": 3600, "seed": 5}
    before = http.get("/v1/control").json()
    assert http.put("/v1/control", json={"verify_floor": 1.5, "escalation_rate": 1.0}).status_code == 200
    try:
        first = finish(http, submit(http, "a tall ship at sea", namespace="why", **far)["id"])
        low = finish(http, submit(http, "a tall ship at sea today", namespace="why", **far)["id"])
    finally:
        http.put("/v1/control", json={n: before[n] for n in ("verify_floor", "escalation_rate")})
    assert low["completion"]["escalated"]
    words = run_modm("requests", "explain", low["id"], env=env).stdout
    assert "yes: scenes-small, " in words
    assert f"from {first['id']}" in words
    assert f"{low['decision']['similarity']:.4f}" in words
    assert "below 1.5000; before that hit: similarity" in words

    ids = [submit(http, f"a quiet harbour {n}", namespace="why2", features="inflight")["id"] for n in range(4)]
    records = [finish(http, i) for i in ids]
    told = [http.get(f"/v1/requests/{i}/explain").json() for i in ids]
    waited = [t for t in told if t["waited_s"] is not None]
    assert waited, [r["decision"]["reason"] for r in records]
    words = run_modm("requests", "explain", waited[0]["record"]["id"], env=env).stdout
    for line in (
        "route",
        "source",
        "similarity",
        "predicted similarity",
        "skipped steps k",
        "waited s",
        "after waiting",
    ):
        assert line in words, words


def test_the_client_raises_the_same_errors(module_stack: TestStack) -> None:
    client = module_stack.client
    with pytest.raises(InvalidInputError, match="prompt"):
        client.post("/v1/requests", {"prompt": ""})
    with pytest.raises(NotFoundError):
        client.get(f"/v1/requests/{new_request_id()}")
    done = client.post("/v1/requests", {"prompt": "client", "policy": "large-only"})
    record = client.get(f"/v1/requests/{done['id']}", wait_s=30)
    with pytest.raises(ConflictError):
        client.post(f"/v1/requests/{record['id']}/cancel")


def test_commands_against_the_stack(module_stack: TestStack, tmp_path: Any) -> None:
    """submit, status, requests, cache: what a user types."""
    env = module_stack.environ
    image = tmp_path / "image.png"
    done = run_modm("submit", "a stone well", "--seed", "3", "--output", str(image), env=env)
    assert (done.returncode, done.stdout.strip()) == (0, str(image)), done.stderr
    with Image.open(image) as opened:
        assert opened.size == (64, 64)
    listed = run_modm("requests", "list", "--json", "--limit", "1", env=env)
    assert "a stone well" in listed.stdout
    assert run_modm("status", env=env).stdout.count("gpu") >= 2
    assert run_modm("cache", "search", "a stone well", env=env).stdout.count("a stone well") >= 1
    assert "clean" in run_modm("cache", "verify", env=env).stdout
    missing = run_modm("requests", "show", new_request_id(), env=env)
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: no request")
    assert run_modm("submit", "", env=env).returncode == 2
    away = run_modm("submit", "x", env=env | {"MODM_URL": "http://127.0.0.1:9"})
    assert away.returncode == 3
    assert "modm up" in away.stderr
