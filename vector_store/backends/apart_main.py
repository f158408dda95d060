"""What `apart` starts: ``python -m vector_store.backends.apart_main FD`` serves one `EdgeBackend` over a socket.

It ends, and lets the store go, when the other side closes the socket or dies. Both sides are ours, so they speak pickle.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from modm_tasks.errors import ModmError, UnavailableError
from vector_store.backends.edge import EdgeBackend


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # for the whole group: the owner ends first, and then this
        signal.signal(number, signal.SIG_IGN)
    link = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, OSError):  # the owner has ended
        try:
            backend = EdgeBackend(**link.recv())
        except ModmError as error:
            link.send((False, error))
            return
        except Exception as error:
            link.send((False, UnavailableError(f"the vector store cannot be opened: {error}")))
            return
        with contextlib.closing(backend):
            link.send((True, None))
            while True:
                link.send(_answer(backend, *link.recv()))


def _answer(backend: EdgeBackend, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[bool, Any]:
    try:
        return True, getattr(backend, method)(*args, **options)
    except ModmError as error:
        return False, error
    except (
        Exception
    ) as error:  # a bug, or an error of the engine that nobody has met: the caller is told, and it goes on
        return False, UnavailableError(f"the vector store failed at {method}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
