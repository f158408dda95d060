"""The embedded engine in a process of its own, so that its work does not hold the caller's interpreter.

Every call of the engine holds the GIL for its whole time: a search a third of a millisecond and more, tidying seconds. In
an orchestrator that stops accepting, routing and answering. Here a thread that waits for the store waits on a socket.
Measured by `ops/benchmarks/front.py` and `ops/benchmarks/search.py` (docs/performance.md).

Where it breaks: calls are served one after the other, and each costs some 0.1 ms more. A process that ends is started
again by the next call; the call that it ended in raises UnavailableError and may or may not have been carried out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from modm_tasks.errors import UnavailableError
from vector_store.backends.base import Filter, Point, Quantisation, Scored
from vector_store.backends.lock import holder_name
from vector_store.embedder import Vector

log = logging.getLogger(__name__)

#: A process that is told to end writes what it holds; one that takes longer is stuck.
END_S = 30.0


class ApartBackend:
    """See `VectorBackend`. Its methods are those of `EdgeBackend`, carried out by `apart_main` in the other process."""

    shared = False

    def __init__(self, folder: Path, *, quantisation: Quantisation = "none", what: str | None = None) -> None:
        """Start the process and take the folder. Raises StoreInUseError that names the process which has it."""
        what = what or holder_name()
        self._given = {"folder": folder.absolute(), "quantisation": quantisation, "what": what, "owner": os.getpid()}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Connection | None = None
        self._closed = False
        with self._lock:
            self._start()

    def collections(self) -> list[str]:
        return cast(list[str], self._call("collections"))

    def create(self, collection: str, dim: int) -> None:
        self._call("create", collection, dim)

    def dim(self, collection: str) -> int:
        return int(self._call("dim", collection))

    def drop(self, collection: str) -> None:
        self._call("drop", collection)

    def upsert(self, collection: str, points: Sequence[Point]) -> None:
        self._call("upsert", collection, points)

    def search(self, collection: str, vector: Vector, *, limit: int = 1, where: Filter | None = None) -> list[Scored]:
        return self.search_each(collection, [vector], limit=limit, where=where)[0]

    def search_each(
        self, collection: str, vectors: Sequence[Vector], *, limit: int = 1, where: Filter | None = None
    ) -> list[list[Scored]]:
        return cast(list[list[Scored]], self._call("search_each", collection, vectors, limit=limit, where=where))

    def get(self, collection: str, ids: Sequence[str], *, with_vectors: bool = False) -> list[Point]:
        return cast(list[Point], self._call("get", collection, ids, with_vectors=with_vectors))

    def scroll(
        self, collection: str, *, where: Filter | None = None, with_vectors: bool = False, only: Sequence[str] = ()
    ) -> Iterator[Point]:
        offset: Any = None
        while True:
            page, offset = self._call("page", collection, offset, where=where, with_vectors=with_vectors, only=only)
            yield from page
            if offset is None:
                return

    def extremes(self, collection: str, key: str, *, limit: int, largest: bool = False) -> list[Point]:
        return cast(list[Point], self._call("extremes", collection, key, limit=limit, largest=largest))

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        self._call("delete", collection, ids)

    def set_payloads(self, collection: str, payloads: Mapping[str, Mapping[str, Any]]) -> None:
        self._call("set_payloads", collection, payloads)

    def count(self, collection: str, where: Filter | None = None) -> int:
        return int(self._call("count", collection, where))

    def tidy(self, collection: str) -> bool:
        return bool(self._call("tidy", collection))

    def disk_bytes(self) -> int:
        return int(self._call("disk_bytes"))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._end()

    # --- the other process ----------------------------------------------------------------------------------------

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        with self._lock:
            if self._closed:
                raise UnavailableError("the vector store is closed")
            if self._link is None:
                log.warning("the vector store's process had ended and is started again")
                self._start()
            assert self._link is not None
            try:
                fine, answer = _ask(self._link, (method, args, options))
            except BaseException:
                self._end()  # an answer that was not taken would be the next call's
                raise
        if fine:
            return answer
        raise answer

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vector_store.backends.apart_main", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._link = Connection(ours.detach())
        try:
            fine, error = _ask(self._link, self._given)
            if not fine:
                raise error
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        link, process = self._link, self._process
        self._link = self._process = None
        if link is not None:
            link.close()  # which tells the other to end
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
                return
            log.error("the vector store's process %d did not end in %.0f s and is killed", process.pid, END_S)
            process.kill()
            process.wait()


def _ask(link: Connection, question: Any) -> tuple[bool, Any]:
    try:
        link.send(question)
        fine, answer = link.recv()
    except (EOFError, OSError) as error:
        raise UnavailableError("the vector store's process has ended; the next call starts it again") from error
    return fine, answer
