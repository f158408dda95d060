"""Settings, messages, errors, logs, keys, limits: the ground that everything stands on."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from modm_tasks.client import error_classes, error_from
from modm_tasks.errors import (
    ConfigError,
    InvalidInputError,
    ModmError,
    NotFoundError,
    RefusedError,
    TraceError,
    UnauthorizedError,
    UnavailableError,
)
from modm_tasks.logs import HumanFormatter, JsonFormatter
from modm_tasks.messages import SubmitRequest, new_request_id, parse_size, seed_of
from modm_tasks.queues import ROLE_QUEUES, queues_of, role_of
from modm_tasks.redis_client import redis_url
from modm_tasks.safety import load_hook
from modm_tasks.settings import load_settings
from orchestrator.auth import Gate, KeyFile, check_listen, is_loopback
from orchestrator.limits import Bucket, RateLimiter, disk_problem, take
from orchestrator.open_requests import SETTLED, OpenRequest, OpenRequests
from orchestrator.replies import error_body

# --- settings -----------------------------------------------------------------------------------------------------


def test_command_line_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modm.toml").write_text(
        'embedder = "file"\nlarge_model = "file"\n[cache]\ncapacity = 5\nmax_depth = 2\n'
    )
    monkeypatch.setenv("MODM_EMBEDDER", "env")
    monkeypatch.setenv("MODM_CACHE__CAPACITY", "7")
    made = load_settings(small_model="line")
    assert (made.small_model, made.embedder, made.large_model) == ("line", "env", "file")
    assert (made.cache.capacity, made.cache.max_depth) == (7, 2)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MODM_CASH__CAPACITY", "5", "MODM_CASH__CAPACITY"),
        ("MODM_CACHE__CAPACITIE", "5", "MODM_CACHE__CAPACITIE"),
        ("MODM_CACHE__CAPACITY", "0", "cache.capacity"),
        ("MODM_CACHE__CAPACITY", "many", "cache.capacity"),
        ("MODM_WORKER__MODE", "heap", "worker.mode"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_unknown_keys_in_the_file_and_broken_files(tmp_path: Path) -> None:
    for text, says in (
        ("embeder = 'x'\n", "embeder"),
        ("[cache]\ncapacty = 1\n", "cache.capacty"),
        ("a = [", "settings"),
    ):
        (tmp_path / "modm.toml").write_text(text)
        with pytest.raises(ConfigError, match=says):
            load_settings()


def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.cli import app

    monkeypatch.setenv("MODM_REDIS_URL", "redis://:hunter2@localhost:1/0")
    monkeypatch.setenv("MODM_API_KEY", "hunter3")
    for option in ([], ["--json"]):
        shown = CliRunner().invoke(app, ["config", "show", *option])
        assert shown.exit_code == 0
        assert "redis_url" in shown.stdout
        assert "hunter" not in shown.stdout


def test_redis_is_named_by_settings_or_by_the_stack(tmp_path: Path) -> None:
    home = tmp_path / "h"
    with pytest.raises(UnavailableError, match="modm up"):
        redis_url(load_settings(home=home))
    home.mkdir()
    (home / "stack.json").write_text(json.dumps({"redis_url": "redis://x:1/0"}))
    assert redis_url(load_settings(home=home)) == "redis://x:1/0"
    assert redis_url(load_settings(home=home, redis_url="redis://y:1/0")) == "redis://y:1/0"


# --- messages and errors ------------------------------------------------------------------------------------------


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_prompt_is_taken_as_it_is_or_refused(text: str) -> None:
    try:
        request = SubmitRequest(prompt=text)
    except ValidationError as error:
        assert error.errors()[0]["loc"] == ("prompt",)  # noqa: PT017
    else:
        assert SubmitRequest.model_validate_json(request.model_dump_json()).prompt == text


@given(st.text(max_size=20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_size_is_two_sides_within_limits_or_a_value_error(text: str) -> None:
    try:
        width, height = parse_size(text)
    except ValueError:
        return
    assert 16 <= min(width, height) <= max(width, height) <= 4096


def test_a_seed_is_the_users_or_the_same_for_every_attempt() -> None:
    request_id = new_request_id()
    assert seed_of(request_id, 5) == 5
    assert seed_of(request_id, None) == seed_of(request_id, None) < 2**31


def test_every_error_has_a_line_of_its_own_and_survives_http() -> None:
    for code, cls in error_classes().items():
        error = cls("m", file="f") if issubclass(cls, TraceError) else cls()
        assert str(error)
        assert error.code == code
        back = error_from(cls.http_status, error_body(error))
        assert isinstance(back, ModmError)
        assert back.retryable == error.retryable
    refused = error_from(429, error_body(RefusedError("busy", retry_after_s=7.5)))
    assert isinstance(refused, RefusedError)
    assert refused.retry_after_s == 7.5


def test_roles_differ_by_their_ordered_queues() -> None:
    for (mode, role), queues in ROLE_QUEUES.items():
        assert queues_of(mode, role) == queues
        assert role_of(mode, queues) == role
    assert role_of("pooled", ("small-refine",)) is None


def test_logs_are_json_lines_with_the_fields_of_the_call() -> None:
    record = logging.LogRecord("a.b", logging.INFO, "f", 1, "done %s", ("é",), None)
    record.request_id = "r1"
    line = json.loads(JsonFormatter("worker").format(record))
    assert (line["message"], line["request_id"], line["process"]) == ("done é", "r1", "worker")
    assert "request_id=r1" in HumanFormatter().format(record)
    try:
        raise ValueError("broken")
    except ValueError:
        failed = logging.LogRecord("a", logging.ERROR, "f", 1, "x", (), sys.exc_info())
    assert "broken" in json.loads(JsonFormatter("w").format(failed))["exception"]


def test_a_log_line_cannot_be_forged_and_the_texts_of_errors_can_be_left_out() -> None:
    record = logging.LogRecord(
        "a", logging.INFO, "f", 1, "no client %s", ("x\n12:00:00 INFO all is well\x1b[2J",), None
    )
    for form in (HumanFormatter(), JsonFormatter("w")):
        assert len(form.format(record).splitlines()) == 1
        assert "\x1b" not in form.format(record)
    try:
        SubmitRequest.model_validate({"prompt": ["my secret wish"]})
    except ValidationError:
        failed = logging.LogRecord("a", logging.ERROR, "f", 1, "x", (), sys.exc_info())
    assert "secret" in HumanFormatter().format(failed)  # which is why it can be left out
    for form in (HumanFormatter(redact=True), JsonFormatter("w", redact=True)):
        told = form.format(failed)
        assert "secret" not in told
        assert "ValidationError" in told
        assert "test_foundations.py" in told


# --- keys and limits ----------------------------------------------------------------------------------------------


def test_keys_are_hashed_found_and_revoked(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    secret = file.add("ann", ["submit", "read"])
    assert secret not in (tmp_path / "keys.json").read_text()
    gate = Gate(KeyFile(tmp_path / "keys.json"))
    assert gate.check(f"Bearer {secret}", "submit").client == "ann"
    for header in (None, "Bearer nonsense", secret, f"Basic {secret}"):
        with pytest.raises(UnauthorizedError):
            gate.caller(header)
    with pytest.raises(UnauthorizedError, match="admin"):
        gate.check(f"Bearer {secret}", "admin")
    with pytest.raises(InvalidInputError, match="client"):
        file.add("no spaces please", ["read"])
    file.revoke("ann")
    assert gate.caller(None).admin  # no keys in use any more
    with pytest.raises(NotFoundError):
        file.revoke("ann")
    for broken in ("{", "3", "[3]", '[{"client": "a"}]'):
        (tmp_path / "keys.json").write_text(broken)
        with pytest.raises(ConfigError, match="key file"):
            file.load()


def test_listening_beyond_loopback_needs_keys(tmp_path: Path) -> None:
    assert is_loopback("127.0.0.9")
    assert not is_loopback("0.0.0.0")
    check_listen(load_settings(api={"host": "::1"}))
    with pytest.raises(ConfigError, match="modm keys add"):
        check_listen(load_settings(api={"host": "0.0.0.0"}))
    check_listen(load_settings(api={"host": "0.0.0.0", "allow_open": True}))
    keys = KeyFile(tmp_path / "k.json")
    keys.add("ann", ["read"])
    beyond = load_settings(api={"host": "0.0.0.0", "keys_file": tmp_path / "k.json"})
    check_listen(beyond)
    gate = Gate.from_settings(beyond)
    keys.revoke("ann")
    with pytest.raises(UnauthorizedError):  # a service that listens to strangers does not open when its keys are gone
        gate.caller(None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e300])
def test_an_arrival_is_a_time(value: float) -> None:
    with pytest.raises(ValidationError, match="arrival_s"):
        SubmitRequest(prompt="a", arrival_s=value)


def test_a_token_bucket_by_hand() -> None:
    bucket, wait = take(None, 60, per_min=60, now_s=0.0)
    assert (bucket.level, wait) == (0.0, 0.0)
    _, wait = take(bucket, 1, per_min=60, now_s=0.25)
    assert wait == pytest.approx(0.75)
    again, wait = take(bucket, 1, per_min=60, now_s=1.0)
    assert (again.level, wait) == (pytest.approx(0.0), 0.0)
    _, wait = take(Bucket(60.0, 0.0), 500, per_min=60, now_s=0.0)  # more than a minute's worth: from a full bucket only
    assert wait == 0.0
    limiter = RateLimiter()
    assert [limiter.take("a", 1, per_min=2, now_s=0.0) for _ in range(3)] == [0.0, 0.0, pytest.approx(30.0)]
    assert limiter.take("b", 1, per_min=2, now_s=0.0) == 0.0


def test_a_nearly_full_disk_is_a_problem(tmp_path: Path) -> None:
    assert disk_problem(tmp_path / "not" / "yet", min_free_mib=0) is None
    assert "the floor is" in (disk_problem(tmp_path, min_free_mib=10**9) or "")


# --- open requests ------------------------------------------------------------------------------------------------


def unit(*values: float) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def test_open_requests_are_found_by_text_earlier_only_and_within_their_space() -> None:
    requests = OpenRequests(2)
    for i, angle in enumerate((0.0, 0.1, 0.2, 1.5)):
        item = OpenRequest(id=f"r{i}", namespace="n", size=None, client="c" if i else "d", order=float(i))
        requests.put(item, unit(np.cos(angle), np.sin(angle)))
    best = requests.most_similar(unit(1, 0.2), namespace="n", size=None, client=None, before=2.0)
    assert [i.id for i, _ in best] == ["r1", "r0"]
    assert best[0][1] > best[1][1] > 0.9
    assert [i.id for i, _ in requests.most_similar(unit(1, 0), namespace="n", size=None, client="d", before=9)] == [
        "r0"
    ]
    assert requests.most_similar(unit(1, 0), namespace="m", size=None, client=None, before=9) == []
    requests.remove("r0")
    requests.keep_only(["r1", "r3"])
    assert len(requests) == 2
    assert requests.get("r2") is None


def test_late_binding_looks_at_what_a_new_image_serves_better() -> None:
    """Cosines with the image are 1, .95, .95, .95, .95 and .7; the thresholds .6, .9 and .99."""
    requests = OpenRequests(2)
    angles, rungs = (0.0, 0.3, 0.31, 0.32, 0.3, 0.8), (3, 0, 1, 2, SETTLED, 0)
    for i, (angle, rung) in enumerate(zip(angles, rungs, strict=True)):
        item = OpenRequest(id=f"r{i}", namespace="n", size=None, client="c", order=float(i), rung=rung)
        requests.put(item, unit(np.cos(angle), np.sin(angle)))

    def found(namespace: str = "n", client: str | None = None, limit: int = 50) -> list[str]:
        better = requests.better_by(
            unit(1, 0), thresholds=(0.6, 0.9, 0.99), namespace=namespace, size=None, client=client, limit=limit
        )
        return [i.id for i, _ in better]

    assert found() == ["r1", "r2", "r5"], "r0 has the top rung, r3 the same one, r4 waits"
    assert found(limit=1) == ["r1"]
    assert found(namespace="m") == found(client="d") == []
    requests.put(OpenRequest(id="r1", namespace="n", size=None, client="c", order=1.0, rung=2), unit(1, 0.3))
    requests.remove("r5")
    assert found() == ["r2"]


def test_open_requests_grow_and_reuse_rows() -> None:
    requests = OpenRequests(4)
    rng = np.random.default_rng(0)
    for i in range(300):
        item = OpenRequest(id=str(i), namespace="n", size=None, client="", order=float(i))
        requests.put(item, unit(*rng.standard_normal(4)))
        if i % 3 == 0:
            requests.remove(str(i))
    assert len(requests) == 200
    kept = requests.get("299")
    assert kept is not None
    (nearest, score), *_ = requests.most_similar(kept[1], namespace="n", size=None, client=None, before=1e9, limit=1)
    assert (nearest.id, round(score, 4)) == ("299", 1.0)


# --- the safety hook ----------------------------------------------------------------------------------------------


def broken_hook(prompt: str, image: object) -> str | None:
    raise RuntimeError(prompt)


def test_the_safety_hook_refuses_with_a_reason_and_a_broken_one_refuses_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_hook("") is None
    monkeypatch.setenv("REFUSED_WORDS", "sword, gun")
    hook = load_hook("modm_tasks.safety:refuse_words")
    assert hook is not None
    assert hook("a red circle", None) is None
    assert "sword" in (hook("a Sword in a stone", None) or "")
    monkeypatch.setitem(sys.modules, "hooks_of_the_test", sys.modules[__name__])
    broken = load_hook("hooks_of_the_test:broken_hook")
    assert broken is not None
    assert broken("x", None) == "the safety check failed"
    for name in ("nothing.here:x", "modm_tasks.safety:nothing", "modm_tasks.safety"):
        with pytest.raises(ConfigError, match="safety_hook"):
            load_hook(name)
