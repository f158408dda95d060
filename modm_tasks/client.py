"""The HTTP client that every sub-command uses: JSON in, JSON out, and the same errors as on the server.

httpx costs 0.3 s of import on a slow core, so it is imported when a client is made, not with this module.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from modm_tasks import errors
from modm_tasks.errors import ConfigError, InvalidInputError, ModmError, NotFoundError, RefusedError, UnavailableError

if TYPE_CHECKING:
    import httpx

    from modm_tasks.settings import Settings

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_BY_STATUS: dict[int, type[ModmError]] = {
    401: errors.UnauthorizedError,
    403: errors.UnauthorizedError,
    404: errors.NotFoundError,
    409: errors.ConflictError,
    429: errors.RefusedError,
    502: errors.UnavailableError,
    503: errors.UnavailableError,
    504: errors.UnavailableError,
}

#: One file of an upload: a path to read, or the bytes themselves.
FilePart = Path | bytes


@dataclass(frozen=True, kw_only=True)
class Event:
    """One server-sent event. ``data`` is the parsed JSON, or the text where it is not JSON."""

    name: str
    data: Any
    id: str = ""


def error_classes() -> dict[str, type[ModmError]]:
    """The error tree by code, e.g. ``invalid_input``."""
    found: dict[str, type[ModmError]] = {}
    todo: list[type[ModmError]] = [ModmError]
    while todo:
        cls = todo.pop()
        name = cls.__name__.removesuffix("Error")
        found["".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))] = cls
        todo += cls.__subclasses__()
    return found


def error_from(status: int, body: object, headers: Mapping[str, str] | None = None) -> ModmError:
    """The error that the server raised, from ``{"error": {"code", "message", "field", "retry_after_s"}}``.

    A body of another form (a proxy's page, say) is judged by the status alone.
    """
    said = body.get("error") if isinstance(body, dict) else None
    said = said if isinstance(said, dict) else {}
    message = str(said.get("message") or f"the server answered {status}")
    field = said.get("field")
    field = field if isinstance(field, str) else None
    fallback = InvalidInputError if status in {400, 405, 413, 415, 422} else ModmError
    cls = error_classes().get(str(said.get("code"))) or _BY_STATUS.get(status, fallback)
    if issubclass(cls, errors.TraceError):  # its parts are in the message already
        cls = InvalidInputError
    if issubclass(cls, RefusedError):
        return cls(message, field=field, retry_after_s=_retry_after_s(said, headers or {}))
    return cls(message, field=field)


def _retry_after_s(said: Mapping[str, Any], headers: Mapping[str, str]) -> float:
    for value in (said.get("retry_after_s"), headers.get("retry-after")):
        try:
            return max(0.0, float(value))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
    return 1.0


def base_url(settings: Settings) -> str:
    """Where the orchestrator is: ``settings.url``, else what ``modm up`` noted in MODM_HOME, else the API's own port."""
    if settings.url:
        return settings.url
    try:
        noted = json.loads((settings.home / "stack.json").read_text(encoding="utf-8"))["url"]
    except (OSError, ValueError, KeyError, TypeError):
        noted = None
    return str(noted) if noted else f"http://127.0.0.1:{settings.api.port or 8000}"


class Client:
    """Thread-safe. Every method raises the ModmError that the server reported, or UnavailableError.

    ``patience_s`` > 0: a refused request (429) is sent again after the server's Retry-After, for at most that long.
    """

    def __init__(
        self, url: str, api_key: str | None = None, *, timeout_s: float = 30.0, patience_s: float = 0.0
    ) -> None:
        import httpx

        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(f"url must look like http://HOST:PORT, not {url!r}", field="url")
        self.url = url.rstrip("/")
        self.timeout_s, self.patience_s = timeout_s, patience_s
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 5.0)),
            # A proxy of the environment must not come between a laptop and its own loopback.
            trust_env=parts.hostname not in LOOPBACK,
            limits=httpx.Limits(max_connections=256, max_keepalive_connections=64),
        )

    @classmethod
    def from_settings(cls, settings: Settings, *, timeout_s: float = 30.0, patience_s: float = 0.0) -> Client:
        key = settings.api_key.get_secret_value() if settings.api_key else None
        return cls(base_url(settings), key, timeout_s=timeout_s, patience_s=patience_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- JSON ---------------------------------------------------------------------------------------------------

    def get(self, path: str, **params: Any) -> Any:
        """Parameters that are None are left out."""
        return self._json("GET", path, params=_given(params))

    def post(self, path: str, json: Any = None, *, headers: Mapping[str, str] | None = None, **params: Any) -> Any:
        return self._json("POST", path, json=json, headers=headers, params=_given(params))

    def put(self, path: str, json: Any = None) -> Any:
        return self._json("PUT", path, json=json)

    def delete(self, path: str, **params: Any) -> Any:
        return self._json("DELETE", path, params=_given(params))

    def upload(
        self,
        path: str,
        files: Mapping[str, FilePart] | Sequence[tuple[str, FilePart]],
        data: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multipart form. Raises NotFoundError for a file that cannot be read."""
        pairs = list(files.items()) if isinstance(files, Mapping) else list(files)
        with ExitStack() as stack:
            parts: list[tuple[str, Any]] = []
            for name, part in pairs:
                if isinstance(part, bytes):
                    parts.append((name, (name, part)))
                    continue
                try:
                    parts.append((name, (part.name, stack.enter_context(part.open("rb")))))
                except OSError as error:
                    raise NotFoundError(f"cannot read {part}: {error.strerror}", field=name) from error
            return self._json("POST", path, files=parts, data=_given(dict(data or {})))

    def _json(self, method: str, path: str, **kwargs: Any) -> Any:
        deadline = time.monotonic() + self.patience_s
        while True:
            with self._outage():
                response = self._http.request(method, path, **kwargs)
            try:
                return _parsed(response)
            except RefusedError as error:
                pause = max(0.05, error.retry_after_s)
                if time.monotonic() + pause >= deadline:
                    raise
                time.sleep(pause)

    # --- bytes and streams --------------------------------------------------------------------------------------

    def bytes(self, path: str, **params: Any) -> bytes:
        """A file's content."""
        with self._outage():
            response = self._http.get(path, params=_given(params))
        if response.is_error:
            _parsed(response)
        return response.content

    def download(self, path: str, dest: Path, **params: Any) -> Path:
        """Write a file's content to ``dest``: under a temporary name first, so that nothing half-written stays."""
        temporary = dest.with_name(f".{dest.name}.{os.getpid()}.part")
        try:
            dest.parent.mkdir(parents=True, exist_ok=True)
            with self._outage(), self._http.stream("GET", path, params=_given(params)) as response:
                if response.is_error:
                    response.read()
                    _parsed(response)
                with temporary.open("wb") as out:
                    for chunk in response.iter_bytes():
                        out.write(chunk)
            temporary.replace(dest)
        except OSError as error:
            raise InvalidInputError(f"cannot write {dest}: {error.strerror or error}", field="output") from error
        finally:
            temporary.unlink(missing_ok=True)
        return dest

    def stream_events(self, path: str, *, idle_s: float | None = None, **params: Any) -> Iterator[Event]:
        """Server-sent events until the server ends the stream. ``idle_s``: longest silence (None = no bound)."""
        import httpx

        timeout = httpx.Timeout(self.timeout_s, connect=5.0, read=idle_s)
        accept = {"accept": "text/event-stream"}
        with (
            self._outage(),
            self._http.stream("GET", path, params=_given(params), headers=accept, timeout=timeout) as response,
        ):
            if response.is_error:
                response.read()
                _parsed(response)
            yield from parse_events(response.iter_lines())

    @contextmanager
    def _outage(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnavailableError(f"no orchestrator at {self.url}; start it with `modm up`") from error
        except httpx.TimeoutException as error:
            raise UnavailableError(f"the orchestrator at {self.url} did not answer in {self.timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise UnavailableError(f"the connection to {self.url} broke: {error or type(error).__name__}") from error
        except (httpx.InvalidURL, httpx.DecodingError) as error:
            raise InvalidInputError(f"{self.url}: {error}", field="url") from error


def _given(params: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in params.items() if v is not None}


def _parsed(response: httpx.Response) -> Any:
    try:
        body = response.json() if response.content else None
    except ValueError:
        body = None
        if response.is_success:
            raise UnavailableError(
                f"{response.url} answered something that is not JSON; is it an orchestrator?"
            ) from None
    if response.is_success:
        return body
    raise error_from(response.status_code, body, response.headers)


def parse_events(lines: Iterator[str]) -> Iterator[Event]:
    """The text/event-stream grammar: fields ``event``, ``data`` (joined by newlines) and ``id``; ``:`` is a comment."""
    name, event_id = "message", ""
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield Event(name=name, data=_loads("\n".join(data)), id=event_id)
            name, data = "message", []
            continue
        field, _colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            event_id = value


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
