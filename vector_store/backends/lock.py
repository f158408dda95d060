"""One process per embedded store, and a message that names it."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import IO

from modm_tasks.errors import StoreInUseError


class StoreLock:
    """An advisory lock on a file that says who holds it. The kernel drops it with the process, whatever way that ends.

    It does not protect a folder that two machines share by NFS without locking: the embedded store is for one machine.
    """

    def __init__(self, folder: Path, what: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "holder.json"
        self._file: IO[str] | None = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(self._path)
            self._file.close()
            self._file = None
            raise StoreInUseError(
                f"the vector store {folder} is held by {holder}; stop it, talk to it over HTTP, or use a Qdrant server"
            ) from None
        what = what or os.path.basename(sys.argv[0] or "python") + "".join(f" {a}" for a in sys.argv[1:2])
        self._file.seek(0)
        self._file.truncate()
        json.dump({"pid": os.getpid(), "what": what[:120]}, self._file)
        self._file.flush()

    def release(self) -> None:
        """Let the next one in. A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _holder(path: Path) -> str:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(noted['pid'])} ({noted['what']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
