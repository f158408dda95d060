"""Logs: JSON lines for machines, one short line for people. One configuration for every process.

No log call has a prompt among its words or fields. The text of an unexpected error may quote what it met, though (a
validation error repeats its input), so ``MODM_LOG_REDACT`` leaves those texts out.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

from modm_tasks.settings import Settings

#: Extra fields a log call may carry: ``log.info("done", extra={"request_id": ..., "route": ...})``.
FIELDS = (
    *("request_id", "worker", "route", "queue", "role", "epoch"),
    *("attempt", "reason", "similarity", "k", "model", "gpu_s"),
)


def one_line(text: str) -> str:
    """Control characters escaped: nobody writes a log line of his own by putting a line break into a name."""
    return "".join(c if c >= " " and c != "\x7f" else c.encode("unicode_escape").decode() for c in text)


class Formatter(logging.Formatter):
    """``redact``: exceptions are told by type, file and line, without their texts."""

    def __init__(self, *, redact: bool = False) -> None:
        super().__init__()
        self.redact = redact

    def formatException(self, ei: Any) -> str:
        if not self.redact:
            return super().formatException(ei)
        kind, _, trace = ei
        frames = "".join(f"  {f.filename}:{f.lineno} in {f.name}\n" for f in traceback.extract_tb(trace))
        return f"{frames}{getattr(kind, '__name__', kind)} (text left out)"


class JsonFormatter(Formatter):
    def __init__(self, process: str, *, redact: bool = False) -> None:
        super().__init__(redact=redact)
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": round(record.created, 3),
            "level": record.levelname,
            "process": self.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {f: v for f in FIELDS if (v := getattr(record, f, None)) is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class HumanFormatter(Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extra = " ".join(f"{f}={v}" for f in FIELDS if (v := getattr(record, f, None)) is not None)
        text = one_line(f"{clock} {record.levelname:<7} {record.name}: {record.getMessage()} {extra}".rstrip())
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(settings: Settings, process: str) -> None:
    """Send all logs to stderr in the form that the settings ask for (auto: human on a terminal, else JSON)."""
    human = settings.log_format == "human" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    redact = settings.log_redact
    handler.setFormatter(HumanFormatter(redact=redact) if human else JsonFormatter(process, redact=redact))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    for noisy in ("httpx", "httpcore", "PIL", "matplotlib", "fsspec", "kombu", "urllib3", "diffusers", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
