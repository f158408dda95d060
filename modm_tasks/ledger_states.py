"""The request state machine: which moves the ledger allows. Everything else is refused, by Python and by Lua alike."""

from __future__ import annotations

from modm_tasks.messages import FINAL, State

#: state -> states it may move to. running -> queued happens when a lease expires, when a worker gives work back and
#: when a hit has to be drawn by the large model after all; waiting -> queued when the source ends; queued -> waiting
#: when an unfinished request turns out to be the better source; waiting/accepted -> done for stored repeats.
MOVES: dict[State, frozenset[State]] = {
    State.ACCEPTED: frozenset({State.QUEUED, State.WAITING, State.DONE, State.FAILED, State.CANCELLED, State.REFUSED}),
    State.WAITING: frozenset({State.QUEUED, State.DONE, State.FAILED, State.CANCELLED}),
    State.QUEUED: frozenset({State.QUEUED, State.RUNNING, State.WAITING, State.FAILED, State.CANCELLED}),
    State.RUNNING: frozenset({State.QUEUED, State.DONE, State.FAILED, State.CANCELLED}),
    State.DONE: frozenset(),
    State.FAILED: frozenset({State.ACCEPTED}),  # only by an operator: `modm requests retry`
    State.CANCELLED: frozenset(),
    State.REFUSED: frozenset(),
}

OPEN = frozenset(State) - FINAL


def allowed(old: State, new: State) -> bool:
    """Whether the ledger may move a request from ``old`` to ``new``."""
    return new in MOVES[old]


def lua_table() -> str:
    """The same constant for the scripts: a set of ``"old>new"`` strings."""
    moves = sorted(f'["{old.value}>{new.value}"]=true' for old, news in MOVES.items() for new in news)
    return "{" + ",".join(moves) + "}"
