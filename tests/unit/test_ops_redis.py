"""The bundled Redis: found, configured safely, survives a kill."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import redis

from modm_tasks.errors import UnavailableError
from ops import redis_server
from ops.redis_server import RunningRedis, find_redis_server, ping, plan_redis, start_redis


def test_configuration_is_private_and_safe(tmp_path: Path) -> None:
    plan = plan_redis(tmp_path / "with space", port=7777)
    config = tmp_path / "with space" / "redis.conf"
    lines = dict(line.split(" ", 1) for line in config.read_text().splitlines())
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "with space" / "password").stat().st_mode) == 0o600
    assert lines["bind"] == "127.0.0.1"
    assert lines["maxmemory-policy"] == "noeviction"
    assert (lines["appendonly"], lines["appendfsync"]) == ("yes", "everysec")
    assert len(lines["requirepass"]) >= 32
    assert lines["requirepass"] not in " ".join(plan.command)


def test_password_is_kept_over_a_restart(tmp_path: Path) -> None:
    assert plan_redis(tmp_path, port=1).url == plan_redis(tmp_path, port=1).url


def test_one_line_says_how_to_get_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(redis_server, "bundled_candidates", list)
    with pytest.raises(UnavailableError, match=r"install Redis or Valkey.*MODM_REDIS_URL") as caught:
        find_redis_server()
    assert "\n" not in str(caught.value)


def test_program_on_path_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = tmp_path / "valkey-server"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == mine


def test_needs_the_password(redis_server: RunningRedis) -> None:
    stranger = redis.Redis(port=redis_server.plan.port)
    with pytest.raises(redis.exceptions.AuthenticationError):
        stranger.ping()
    stranger.close()


def test_databases_are_apart(redis_server: RunningRedis) -> None:
    one, two = (redis.Redis.from_url(redis_server.database(n)) for n in (4000, 4001))
    one.set("key", "value")
    assert two.get("key") is None
    one.flushdb()
    one.close()
    two.close()


def test_acknowledged_write_survives_a_kill(tmp_path: Path) -> None:
    first = start_redis(tmp_path, fsync="always")
    client = redis.Redis.from_url(first.url)
    client.set("key", "value")
    client.close()
    first.process.kill()
    first.process.wait()
    assert ping(first.url, timeout_s=0.5) is not None
    second = start_redis(tmp_path, port=first.plan.port, fsync="always")
    try:
        client = redis.Redis.from_url(first.url)
        assert client.get("key") == b"value"
        client.close()
    finally:
        second.stop()


def test_a_taken_port_is_one_line(redis_server: RunningRedis, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="did not start"):
        start_redis(tmp_path, port=redis_server.plan.port)
