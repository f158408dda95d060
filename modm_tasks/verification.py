"""Whether a refined image that scored low is drawn again by the large model. Pure; worker and simulator ask the same.

A second drawing costs a whole large image. It is bought where it helps its own request (the deadline still allows it) and
hurts no other: the share of hits that may be drawn again falls with the backlog, to nothing when what is queued already
keeps all workers busy for as long as a request may take. So verification never lowers the throughput at saturation.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A floor that no cosine is below: verified, and always kept.
NO_FLOOR = -1.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the system has to do, and how long the request has been in it. Seconds; 0 where not known yet.

    ``wait_s``: queued work over the workers. ``slo_s``: the request's own deadline, from its arrival. ``age_s``: since then.
    ``hits`` and ``escalated`` of the window.
    """

    hits: float
    escalated: float
    wait_s: float = 0.0
    slo_s: float = 0.0
    age_s: float = 0.0
    large_s: float = 0.0


def escalation_budget(rate: float, *, wait_s: float, slo_s: float) -> float:
    """Share of the hits that may be drawn again: all of ``rate`` while nothing waits, none at an SLO's worth of work."""
    if slo_s <= 0:
        return rate
    return rate * max(0.0, 1 - wait_s / slo_s)


def may_escalate(score: float, floor: float, load: Load, *, rate: float) -> bool:
    """Whether the image is drawn again: its score is below the floor, its deadline allows it, the budget is not spent."""
    if score >= floor or (load.slo_s > 0 and load.age_s + load.large_s > load.slo_s):
        return False
    return load.escalated < escalation_budget(rate, wait_s=load.wait_s, slo_s=load.slo_s) * max(1.0, load.hits)
