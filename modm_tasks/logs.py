"""Logs: JSON lines for machines, one short line for people. One configuration for every process."""

from __future__ import annotations

import json
import logging
import sys
import time

from modm_tasks.settings import Settings

#: Extra fields a log call may carry: ``log.info("done", extra={"request_id": ..., "route": ...})``.
FIELDS = (
    *("request_id", "worker", "route", "queue", "role", "epoch"),
    *("attempt", "reason", "similarity", "k", "model", "gpu_s"),
)


class JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
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


class HumanFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extra = " ".join(f"{f}={v}" for f in FIELDS if (v := getattr(record, f, None)) is not None)
        text = f"{clock} {record.levelname:<7} {record.name}: {record.getMessage()} {extra}".rstrip()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(settings: Settings, process: str) -> None:
    """Send all logs to stderr in the form that the settings ask for (auto: human on a terminal, else JSON)."""
    human = settings.log_format == "human" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HumanFormatter() if human else JsonFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    for noisy in ("httpx", "httpcore", "PIL", "matplotlib", "fsspec", "kombu", "urllib3", "diffusers", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
