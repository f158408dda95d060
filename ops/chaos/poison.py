"""A safety hook that dies: what `make chaos` gives the workers, so that a real engine has prompts that kill it too."""

from __future__ import annotations

import os
import signal
from typing import Any

#: The mark of a poison prompt; the fake engine knows it too, and dies in its first step.
CRASH = "[[crash]]"
HOOK = "ops.chaos.poison:crash"


def crash(prompt: str, image: Any) -> str | None:
    """At admission nothing; after drawing, SIGKILL to the process that drew, as a broken GPU driver would send it."""
    if image is not None and CRASH in prompt:
        os.kill(os.getpid(), signal.SIGKILL)
    return None
