"""A second host on one machine: a network and a host name of its own (namespaces), joined by a cable (a veth pair).

Processes and disks are shared, as the image store of two hosts has to be. Needs root; callers do without otherwise.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

NAME = "modm-host-b"


class SecondHost:
    """``ours`` is the address under which it reaches this host, ``prefix`` what runs a command there."""

    def __init__(self) -> None:
        """Raises OSError where this user may not make namespaces."""
        # One pair of addresses for each run, so that two runs beside each other do not meet.
        low = os.getpid() % 16384 * 4
        network = f"10.213.{low // 256}.{low % 256}"
        base, last = network.rsplit(".", 1)
        self.ours, theirs = f"{base}.{int(last) + 1}", f"{base}.{int(last) + 2}"
        self._cable = f"modm{os.getpid()}a"
        far = f"modm{os.getpid()}b"
        # Its end is bounded, should this process be killed.
        self._holder = subprocess.Popen(["unshare", "--net", "--uts", "sleep", "3600"], stderr=subprocess.DEVNULL)
        spaces = Path("/proc", str(self._holder.pid), "ns")
        self.prefix: tuple[str, ...] = ("nsenter", f"--net={spaces / 'net'}", f"--uts={spaces / 'uts'}", "--")
        try:
            self._wait_for(spaces / "net")
            _run("ip", "link", "add", self._cable, "type", "veth", "peer", "name", far, "netns", str(self._holder.pid))
            _run("ip", "addr", "add", f"{self.ours}/30", "dev", self._cable)
            _run("ip", "link", "set", self._cable, "up")
            _run(*self.prefix, "ip", "addr", "add", f"{theirs}/30", "dev", far)
            _run(*self.prefix, "ip", "link", "set", far, "up")
            _run(*self.prefix, "ip", "link", "set", "lo", "up")
            _run(*self.prefix, sys.executable, "-c", f"import socket; socket.sethostname({NAME!r})")
        except OSError:
            self.remove()
            raise

    def _wait_for(self, space: Path) -> None:
        own, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 5
        while time.monotonic() < deadline and self._holder.poll() is None:
            with contextlib.suppress(OSError):
                if os.readlink(space) != own:
                    return
            time.sleep(0.01)
        raise OSError("this user may not make network namespaces")

    def cut(self) -> None:
        """Pull the cable: whatever is sent is lost without a word."""
        _run("ip", "link", "set", self._cable, "down")

    def join(self) -> None:
        _run("ip", "link", "set", self._cable, "up")

    def remove(self) -> None:
        """The namespaces end with their last process, and the cable with them."""
        with contextlib.suppress(OSError):
            subprocess.run(["ip", "link", "del", self._cable], capture_output=True, check=False)
        self._holder.kill()
        self._holder.wait()


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise OSError(str(error)) from error
    if done.returncode:
        raise OSError(f"{' '.join(command[:4])}: {done.stderr.strip()[:200]}")
