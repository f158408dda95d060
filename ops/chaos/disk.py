"""A small file system for the images, so that a disk can really be full: a tmpfs, where this user may mount one."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from pathlib import Path

#: Above the floor below which nothing is accepted (``orchestrator.limits.MIN_FREE_MIB``), with room for a run's images.
SIZE_MIB = 384


class SmallDisk:
    """Mounted on ``folder`` until ``remove``."""

    def __init__(self, folder: Path, *, size_mib: int = SIZE_MIB) -> None:
        """Raises OSError where it may not be mounted."""
        self.folder = folder
        self._filler = folder / ".filler"
        folder.mkdir(parents=True, exist_ok=True)
        self.remove()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0755", "modm-chaos", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip())

    def fill(self) -> None:
        """Until not one more byte fits."""
        with self._filler.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**20))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    def remove(self) -> None:
        """Unmount what is mounted there, if anything."""
        with contextlib.suppress(OSError):
            subprocess.run(["umount", "--lazy", str(self.folder)], capture_output=True, check=False)
