"""`modm doctor`: what is missing or misconfigured, and the command that mends it. Loads no model and no torch."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata

from pydantic import BaseModel, ConfigDict

from modm_tasks.errors import ModmError
from modm_tasks.settings import Settings, load_settings
from ops import processes, stack
from ops.redis_server import find_redis_server, ping

FREE_MIB = 1024


class Check(BaseModel):
    """One finding; ``mend`` is the command or change that helps when it is not ok."""

    model_config = ConfigDict(frozen=True)

    name: str
    ok: bool
    said: str
    mend: str = ""


def examine() -> list[Check]:
    """All checks. Settings that cannot be read end it early, because everything else depends on them."""
    checks = [_python(), _packages()]
    try:
        settings = load_settings()
    except ModmError as error:
        return [*checks, Check(name="settings", ok=False, said=str(error), mend="correct or unset it")]
    checks.append(Check(name="settings", ok=True, said=f"read, MODM_HOME={settings.home}"))
    for examine_one in (_home, _redis, _models, _embedder, _ladder, _device, _port, _running):
        checks.append(examine_one(settings))
    return checks


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check(
        name="python", ok=(3, 11) <= sys.version_info[:2] < (3, 13), said=version, mend="make setup PYTHON=python3.11"
    )


def _packages() -> Check:
    """Missing packages, and a torchvision that was built for another torch (its import fails on ``torchvision::nms``)."""
    missing = []
    for requirement in metadata.requires("modm-serving") or []:
        if "extra ==" in requirement or "sys_platform" in requirement:
            continue
        name = "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check(name="packages", ok=False, said=f"missing: {', '.join(missing)}", mend="make setup")
    builds = {metadata.version(n).partition("+")[2] for n in ("torch", "torchvision")}
    matched = len(builds) == 1
    said = f"torch {metadata.version('torch')}, torchvision {metadata.version('torchvision')}"
    return Check(name="packages", ok=matched, said=said, mend="rm -rf .venv && make setup (both from one index)")


def _home(settings: Settings) -> Check:
    home = settings.home.absolute()
    place = home
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Check(name="home", ok=False, said=f"{home} cannot be written", mend="set MODM_HOME to a folder of yours")
    free_mib = shutil.disk_usage(place).free // 2**20
    said = f"{home}, {free_mib} MiB free"
    return Check(name="home", ok=free_mib >= FREE_MIB, said=said, mend="free some disk, or move MODM_HOME")


def _redis(settings: Settings) -> Check:
    if settings.redis_url is None:
        try:
            return Check(name="redis", ok=True, said=str(find_redis_server()))
        except ModmError as error:
            return Check(name="redis", ok=False, said="no server program", mend=str(error))
    url = settings.redis_url.get_secret_value()
    if problem := ping(url):
        return Check(name="redis", ok=False, said=problem, mend="start it, or unset MODM_REDIS_URL to use the bundled")
    policy = _eviction_policy(url)
    return Check(
        name="redis",
        ok=policy in {"noeviction", "unknown"},
        said=f"answers; maxmemory-policy {policy}",
        mend="redis-cli config set maxmemory-policy noeviction (evicted keys lose requests silently)",
    )


def _eviction_policy(url: str) -> str:
    import redis

    client = redis.Redis.from_url(url, socket_timeout=2, decode_responses=True)
    try:
        return str(client.config_get("maxmemory-policy").get("maxmemory-policy", "unknown"))
    except redis.exceptions.RedisError:  # managed services forbid CONFIG
        return "unknown"
    finally:
        client.close()


def _guarded(name: str, mend: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name=name, ok=True, said=look())
    except ModmError as error:
        return Check(name=name, ok=False, said=str(error), mend=mend)


def _models(settings: Settings) -> Check:
    from workers.catalogue import check_pair

    def look() -> str:
        large, small = check_pair(settings)
        return f"large {large.name}, small {small.name}"

    if settings.worker.engine == "fake":
        return Check(name="models", ok=True, said="fake engine, no weights needed")
    return _guarded("models", "modm models list; modm models pull NAME; bundled ones: make train-scenes", look)


def _embedder(settings: Settings) -> Check:
    from vector_store.embedder import embedder_identity

    return _guarded("embedder", "set MODM_EMBEDDER, or make train-scenes", lambda: embedder_identity(settings.embedder))


def _ladder(settings: Settings) -> Check:
    from orchestrator.build import choose_ladder

    def look() -> str:
        ladder = choose_ladder(settings)
        return f"{len(ladder.rungs)} rungs, hits from {ladder.rungs[0].min_similarity:g} on"

    return _guarded("ladder", "modm calibrate, then MODM_ROUTING__LADDER_FILE=FILE", look)


def _device(settings: Settings) -> Check:
    gpus = stack.gpu_count()
    wants_gpu = settings.worker.device in {"cuda"}
    return Check(
        name="device",
        ok=bool(gpus) or not wants_gpu,
        said=f"{gpus} GPUs" if gpus else f"no GPU, {os.cpu_count()} CPU cores",
        mend="install the driver, or MODM_WORKER__DEVICE=cpu",
    )


def _port(settings: Settings) -> Check:
    api = settings.api
    try:
        state = stack.read_state(settings.home)
        ours = state is not None and any(processes.alive(p) for p in state.processes)
        if api.port and not ours:
            stack.check_port(api.host, api.port)
        return Check(name="port", ok=True, said=f"{api.host}:{api.port}")
    except ModmError as error:
        return Check(name="port", ok=False, said=str(error), mend="MODM_API__PORT=0")


def _running(settings: Settings) -> Check:
    try:
        state = stack.read_state(settings.home)
    except ModmError as error:
        return Check(name="stack", ok=False, said=str(error), mend=f"rm {stack.state_path(settings.home)}")
    if state is None:
        return Check(name="stack", ok=True, said="not started (modm up)")
    dead = stack.died(state)
    said = f"up at {state.url}" if not dead else f"ended: {', '.join(dead)}; logs in {settings.home / 'logs'}"
    return Check(name="stack", ok=not dead, said=said, mend="modm down && modm up")
