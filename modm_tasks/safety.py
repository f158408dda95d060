"""The safety hook: a callable of the operator's that looks at each prompt and each finished image. Off by default.

``MODM_SAFETY_HOOK=package.module:function`` names it. It is called as ``function(prompt, image)``, at admission with
``image=None`` and after drawing with a PIL image, and answers None (fine) or a reason (refused). A hook that raises
refuses too: a broken check must not let everything through. An example: ``modm_tasks.safety:refuse_words``.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

from modm_tasks.errors import ConfigError

log = logging.getLogger(__name__)

Hook = Callable[[str, Any], str | None]


def load_hook(name: str) -> Hook | None:
    """The callable that ``module:function`` names, guarded; None for an empty name. Raises ConfigError."""
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"safety_hook {name!r}: {error}", field="safety_hook") from error
    if not callable(hook):
        raise ConfigError(f"safety_hook {name!r} cannot be called", field="safety_hook")

    def guarded(prompt: str, image: Any) -> str | None:
        try:
            reason = hook(prompt, image)
        except Exception:
            log.exception("the safety hook failed, so what it was asked about is refused")
            return "the safety check failed"
        return None if reason is None else str(reason)[:200]

    return guarded


def refuse_words(prompt: str, image: Any) -> str | None:
    """Example: refuses prompts with a word of the comma-separated environment variable ``REFUSED_WORDS``."""
    words = {w.strip().lower() for w in os.environ.get("REFUSED_WORDS", "").split(",") if w.strip()}
    found = words & set(prompt.lower().split())
    return f"the word {min(found)!r} is not allowed here" if image is None and found else None
