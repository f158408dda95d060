"""How `modm flower` is started: the refusals, the command line and the environment. Pure."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Mapping
from pathlib import Path

from modm_tasks.errors import ConfigError
from modm_tasks.redis_client import redis_url
from modm_tasks.settings import Settings

CONFIG = Path(__file__).with_name("flowerconfig.py")
AUTH = "FLOWER_BASIC_AUTH"


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address. A name other than localhost is not trusted to be."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def flower_command(settings: Settings, *, address: str, port: int, environ: Mapping[str, str]) -> list[str]:
    """Raises ConfigError where Flower would be open to others, because it shows every task to who can reach it."""
    auth = environ.get(AUTH, "")
    if not is_loopback(address) and not _is_auth(auth):
        raise ConfigError(f"flower on {address or 'every address'} needs {AUTH}=user:password", field="address")
    return [
        *(sys.executable, "-m", "celery", "-A", "modm_tasks.app", "flower"),
        *(f"--conf={CONFIG}", f"--address={address}", f"--port={port}"),
    ]


def _is_auth(text: str) -> bool:
    pairs = [part.partition(":") for part in text.split(",")]
    return all(user.strip() and password.strip() for user, _, password in pairs)


def flower_environ(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """The broker goes through the environment, so that its password is in no process list."""
    return dict(environ) | {"MODM_REDIS_URL": redis_url(settings)}
