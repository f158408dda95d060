"""One way to reach Redis, and one error when it is away."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from modm_tasks.errors import UnavailableError
from modm_tasks.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")


def redis_url(settings: Settings) -> str:
    """The URL from the settings, else the one that ``modm up`` noted in MODM_HOME. Raises UnavailableError."""
    if settings.redis_url is not None:
        return settings.redis_url.get_secret_value()
    try:
        noted = json.loads((settings.home / "stack.json").read_text())
        return str(noted["redis_url"])
    except (OSError, ValueError, KeyError):
        raise UnavailableError(
            f"no Redis: set MODM_REDIS_URL or start the stack with `modm up` (MODM_HOME={settings.home})"
        ) from None


def connect(url: str) -> redis.Redis:
    """A client that answers with text, retries a dropped connection and never waits for ever."""
    extra: dict[str, Any] = {} if url.startswith("unix") else {"socket_connect_timeout": 3, "socket_keepalive": True}
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=10,
        health_check_interval=15,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 3),
        **extra,
    )


def guarded(method: Callable[P, T]) -> Callable[P, T]:
    """Turn every error of redis-py into UnavailableError, so that callers know one kind of outage."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except redis.exceptions.RedisError as error:
            raise UnavailableError(f"Redis does not answer: {short(error)}") from error

    return call


def short(error: BaseException) -> str:
    """One line of an error, without secrets: redis-py repeats the address, never the password."""
    text = str(error).splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def pairs(flat: list[Any]) -> dict[str, str]:
    """HGETALL inside Lua answers a flat list."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
