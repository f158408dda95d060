"""A safety hook that dies: what `make chaos` gives the workers, so that a real engine has prompts that kill it too."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

from modm_tasks.settings import get_settings

#: The mark of a poison prompt; the fake engine knows it too, and dies in its first step.
CRASH = "[[crash]]"
#: The mark of a prompt whose first drawing is well and whose every later one kills.
AGAIN = "[[again]]"
HOOK = "ops.chaos.poison:crash"


def crash(prompt: str, image: Any) -> str | None:
    """At admission nothing; after drawing, SIGKILL to the process that drew, as a broken GPU driver would send it."""
    if image is not None and (CRASH in prompt or (AGAIN in prompt and _drawn_before(prompt))):
        os.kill(os.getpid(), signal.SIGKILL)
    return None


def _drawn_before(prompt: str) -> bool:
    """Whether any worker has drawn it; from now on one has."""
    folder = Path(get_settings().home.absolute(), "drawn")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / hashlib.sha256(prompt.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False
