"""Who may call what: API keys with scopes, and the rule that a service beyond loopback has keys.

Keys are 256 random bits, so a plain SHA-256 at rest is enough: there is no dictionary to try, and a slow hash would only
let a stranger burn our CPU. Comparison takes constant time and visits every key, so time tells neither which nor how much.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import os
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Header, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modm_tasks.errors import ConfigError, InvalidInputError, NotFoundError, RefusedError, UnauthorizedError
from modm_tasks.settings import Settings
from orchestrator.limits import RateLimiter

Scope = Literal["submit", "read", "admin"]
SCOPES: tuple[Scope, ...] = ("submit", "read", "admin")
PREFIX = "modm_"


class ApiKey(BaseModel):
    """A key at rest. ``digest`` is the SHA-256 of the secret, hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    client: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...]
    created_s: float
    requests_per_min: int = Field(0, ge=0)


class Caller(BaseModel):
    """Who calls. ``client`` is empty where no keys are in use; then the caller may do everything."""

    model_config = ConfigDict(frozen=True)
    client: str = ""
    scopes: tuple[Scope, ...] = SCOPES
    requests_per_min: int = 0

    @property
    def admin(self) -> bool:
        return "admin" in self.scopes


_EVERYBODY = Caller()


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def keys_path(settings: Settings) -> Path:
    return settings.api.keys_file or settings.home / "keys.json"


class KeyFile:
    """The file of keys, mode 0600, replaced as a whole; a running service sees changes at its next call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._keys: list[ApiKey] = []

    def load(self) -> list[ApiKey]:
        """All keys. Raises ConfigError where the file is broken."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._seen, self._keys = None, []
            return []
        stamp = (stat.st_mtime_ns, stat.st_size)
        if stamp != self._seen:
            try:
                rows = json.loads(self.path.read_text())
                self._keys = [ApiKey.model_validate(row) for row in rows]
            except (OSError, TypeError, ValueError) as error:  # a ValidationError is a ValueError
                raise ConfigError(
                    f"key file {self.path}: {str(error).splitlines()[0]}", field="api.keys_file"
                ) from error
            self._seen = stamp
        return self._keys

    def add(self, client: str, scopes: Sequence[Scope], *, requests_per_min: int = 0) -> str:
        """A new key; returns the secret, which is shown once and stored nowhere."""
        secret = PREFIX + secrets.token_urlsafe(32)
        try:
            key = ApiKey(
                client=client, digest=digest(secret), scopes=tuple(scopes), created_s=time.time(),
                requests_per_min=requests_per_min,
            )  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidInputError(f"{first['loc'][0]}: {first['msg']}", field=str(first["loc"][0])) from error
        self._save([*self.load(), key])
        return secret

    def revoke(self, client: str) -> int:
        """Remove all keys of a client. Raises NotFoundError where it has none."""
        keys = self.load()
        kept = [k for k in keys if k.client != client]
        if len(kept) == len(keys):
            raise NotFoundError(f"no key of client {client!r}", field="client")
        self._save(kept)
        return len(keys) - len(kept)

    def _save(self, keys: Sequence[ApiKey]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".keys")  # mkstemp makes it 0600
        with os.fdopen(handle, "w") as file:
            json.dump([k.model_dump() for k in keys], file, indent=1)
        os.replace(name, self.path)

    def find(self, secret: str) -> ApiKey | None:
        """The key of a secret, in constant time."""
        wanted, found = digest(secret), None
        for key in self.load():
            if hmac.compare_digest(key.digest, wanted):
                found = key
        return found


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_listen(settings: Settings) -> None:
    """Refuse to listen beyond loopback without keys. Raises ConfigError."""
    api = settings.api
    if is_loopback(api.host) or api.allow_open or KeyFile(keys_path(settings)).load():
        return
    raise ConfigError(
        f"listening on {api.host} needs API keys: `modm keys add CLIENT`, or say MODM_API__ALLOW_OPEN=true",
        field="api.host",
    )


class Gate:
    """Checks callers. Without keys everybody is let in, unless ``required``; with keys, only they are.

    ``required`` holds beyond loopback: there a revoked last key, or a lost file, must not open the service to all.
    """

    def __init__(self, keys: KeyFile, *, default_per_min: int = 0, required: bool = False) -> None:
        self.keys = keys
        self.required = required
        self.default_per_min = default_per_min
        self.limiter = RateLimiter()

    @classmethod
    def from_settings(cls, settings: Settings) -> Gate:
        api = settings.api
        return cls(
            KeyFile(keys_path(settings)),
            default_per_min=api.requests_per_min_per_client,
            required=not (is_loopback(api.host) or api.allow_open),
        )

    def caller(self, authorization: str | None) -> Caller:
        """Raises UnauthorizedError without a valid ``Bearer`` key, where keys are in use."""
        if not self.keys.load() and not self.required:
            return _EVERYBODY
        scheme, _, secret = (authorization or "").partition(" ")
        key = self.keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise UnauthorizedError("a valid API key is needed: Authorization: Bearer KEY", field="Authorization")
        return Caller(client=key.client, scopes=key.scopes, requests_per_min=key.requests_per_min)

    def check(self, authorization: str | None, scope: Scope) -> Caller:
        caller = self.caller(authorization)
        if scope not in caller.scopes and not caller.admin:
            raise UnauthorizedError(f"this key lacks the scope {scope!r}", field="Authorization")
        return caller

    def require(self, scope: Scope) -> Callable[..., Awaitable[Caller]]:
        """FastAPI dependency: the caller, who has this scope. Async, because a thread for it costs more than it does."""

        async def dependency(authorization: Annotated[str | None, Header()] = None) -> Caller:
            return self.check(authorization, scope)

        return dependency

    def by_method(self, *, read: Scope, write: Scope) -> Callable[..., Awaitable[Caller]]:
        """FastAPI dependency: one scope for GET, another for everything that changes something."""

        async def dependency(request: Request, authorization: Annotated[str | None, Header()] = None) -> Caller:
            return self.check(authorization, read if request.method in {"GET", "HEAD"} else write)

        return dependency

    def admit(self, caller: Caller, count: int) -> None:
        """Rate limit of the caller. Raises RefusedError with the time until the next request would pass."""
        per_min = caller.requests_per_min or self.default_per_min
        wait_s = self.limiter.take(caller.client, count, per_min=per_min, now_s=time.monotonic()) if per_min else 0.0
        if wait_s > 0:
            raise RefusedError(f"more than {per_min} requests a minute", retry_after_s=round(wait_s, 2))
