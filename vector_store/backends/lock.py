"""One process per embedded store, and a message that names it."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import IO

from modm_tasks.errors import StoreInUseError

#: How long a store whose owner has died is waited for: its own process (`apart`) lets go once it has written what it holds.
ORPHAN_S = 15.0


class StoreLock:
    """An advisory lock on a file that says who holds it. The kernel drops it with the process, whatever way that ends.

    It does not protect a folder that two machines share by NFS without locking: the embedded store is for one machine.
    """

    def __init__(self, folder: Path, what: str | None = None, owner: int | None = None) -> None:
        """``owner``: the process on whose behalf this one holds it, and which is named to others. Raises StoreInUseError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "holder.json"
        self._file: IO[str] | None = self._path.open("a+", encoding="utf-8")
        until = time.monotonic() + ORPHAN_S
        while not _locked(self._file):
            if not _owner_is_dead(self._path) or time.monotonic() > until:
                self._file.close()
                self._file = None
                raise StoreInUseError(
                    f"the vector store {folder} is held by {_holder(self._path)}; stop it, talk to it over HTTP, or use a "
                    "Qdrant server"
                )
            time.sleep(0.05)
        self._file.seek(0)
        self._file.truncate()
        json.dump({"pid": owner or os.getpid(), "what": (what or holder_name())[:120]}, self._file)
        self._file.flush()

    def release(self) -> None:
        """Let the next one in. A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None


def holder_name() -> str:
    """This process in a few words: its program and first argument."""
    return os.path.basename(sys.argv[0] or "python") + "".join(f" {a}" for a in sys.argv[1:2])


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _noted(path: Path) -> tuple[int, str] | None:
    """(process, what it is) of the holder; None where nothing readable is noted."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return int(noted["pid"]), str(noted["what"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _holder(path: Path) -> str:
    noted = _noted(path)
    return f"process {noted[0]} ({noted[1]})" if noted else "another process"


def _owner_is_dead(path: Path) -> bool:
    noted = _noted(path)
    if noted is None:
        return False
    try:
        os.kill(noted[0], 0)
    except OSError as error:  # any other means that it is there, and not ours to signal
        return isinstance(error, ProcessLookupError)
    return False
