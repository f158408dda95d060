"""The one error tree of MoDM.

* ModmError
    * InvalidInputError            the user's mistake: names the field and the limit
        * TraceError               a malformed trace: file, row and field
        * ConfigError              settings or catalogue
    * NotFoundError                no such request, image, worker or model
    * ConflictError                the move is not allowed from the present state
        * LeaseLostError           another attempt owns the request now
    * RefusedError                 admission refused: overload, quota, full disk (carries retry_after_s)
    * UnauthorizedError            no key, or a key without the scope
    * CancelledByUserError         stopped at a step boundary because the user asked
    * UnavailableError             a dependency is down (Redis, orchestrator, Qdrant)
        * StoreInUseError          the embedded vector store is held by another process
    * EngineError                  a model failed to load or to draw
        * OutOfMemoryError         the device had no room, even after freeing
        * SourceImageError         the image to refine is gone or unreadable
    * GateError                    a benchmark or demo missed its bar

The message of an error without one is the first line of its class's docstring.
"""

from __future__ import annotations

from typing import ClassVar


class ModmError(Exception):
    """Something went wrong."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, *, field: str | None = None) -> None:
        doc = (type(self).__doc__ or "").strip().splitlines()
        super().__init__(message or (doc[0] if doc else type(self).__name__))
        self.field = field

    @property
    def code(self) -> str:
        """Stable machine-readable name, e.g. ``invalid_input``."""
        name = type(self).__name__.removesuffix("Error")
        return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


class InvalidInputError(ModmError):
    """The input is not valid."""

    exit_code = 2
    http_status = 422


class TraceError(InvalidInputError):
    """The trace is malformed."""

    def __init__(self, message: str, *, file: str, row: int | None = None, field: str | None = None) -> None:
        where = file if row is None else f"{file}, row {row}"
        super().__init__(f"{where}: {f'field {field!r}: ' if field else ''}{message}", field=field)
        self.file, self.row, self.reason = file, row, message


class ConfigError(InvalidInputError):
    """The settings are not valid."""


class NotFoundError(ModmError):
    """There is no such thing."""

    http_status = 404


class ConflictError(ModmError):
    """Not allowed in the present state."""

    http_status = 409


class LeaseLostError(ConflictError):
    """Another attempt owns this request now."""


class RefusedError(ModmError):
    """The system takes no more work at present."""

    http_status = 429
    retryable = True

    def __init__(self, message: str | None = None, *, retry_after_s: float = 1.0, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s


class UnauthorizedError(ModmError):
    """An API key with the right scope is needed."""

    http_status = 401


class CancelledByUserError(ModmError):
    """The request was cancelled."""

    http_status = 409


class UnavailableError(ModmError):
    """A service that is needed does not answer."""

    exit_code = 3
    http_status = 503
    retryable = True


class StoreInUseError(UnavailableError):
    """The embedded vector store is held by another process."""


class EngineError(ModmError):
    """The model could not be loaded or run."""


class OutOfMemoryError(EngineError):
    """The device has too little memory."""

    retryable = True


class SourceImageError(EngineError):
    """The source image is gone or unreadable."""

    retryable = True


class GateError(ModmError):
    """A measured figure misses its bar."""

    exit_code = 4
