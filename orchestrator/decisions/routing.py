"""Which queue serves a request, and from which image. Pure functions of what was found; the reason comes with the answer.

Policies: `modm` is the published algorithm (paper sections 4.2 and 5.2), `large-only` and `small-only` are comparison
points, `modm-plus` adds the mechanisms below, each of which can be named by itself in ``features``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from modm_tasks.errors import InvalidInputError
from modm_tasks.messages import Decision, Route, SubmitRequest
from modm_tasks.verification import NO_FLOOR
from orchestrator.decisions.ladder import Ladder

POLICIES = ("modm", "modm-plus", "large-only", "small-only")
#: inflight: wait for an unfinished source; late-binding: look again at queued misses; repeats: exact repeats;
#: verify: score refined hits; deadline: order by slack; drift: bound on generation depth.
FEATURES = ("inflight", "late-binding", "repeats", "verify", "deadline", "drift")

#: How much longer than drawing it anew a request may take by waiting while workers stand idle, as a factor.
IDLE_PATIENCE = 1.5
#: Under `deadline`: by how many times its service time a request lets shorter ones go first.
YIELD = 2.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """The most similar finished image. ``similarity`` is text-to-image cosine, clamped at 0."""

    id: str
    uri: str
    similarity: float
    depth: int = 0
    same_prompt: bool = False
    same_seed: bool = False


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """An open request that may become a source. ``predicted`` is the text-to-image cosine its image should have."""

    id: str
    predicted: float
    ready_in_s: float = 0.0
    chain_depth: int = 0


@dataclass(frozen=True, kw_only=True)
class RouteInput:
    """Everything a decision may depend on. Times in seconds; ``*_service_s`` of a full image."""

    request: SubmitRequest
    policy: str
    features: frozenset[str]
    ladder: Ladder
    total_steps: int
    found: Found | None = None
    unfinished: Unfinished | None = None
    large_service_s: float = 0.0
    small_service_s: float = 0.0
    miss_wait_s: float = 0.0
    lowered_rungs: int = 0
    repeat_max_k: int = 25
    wait_depth: int = 8


def check_policy(name: str) -> str:
    """Raises InvalidInputError that names the policies."""
    if name not in POLICIES:
        raise InvalidInputError(f"unknown policy {name!r}; there are {', '.join(POLICIES)}", field="policy")
    return name


def check_features(text: str) -> frozenset[str]:
    """``"inflight,late-binding"`` to a set. Raises InvalidInputError that names the mechanisms."""
    names = frozenset(part.strip() for part in text.split(",") if part.strip())
    if unknown := sorted(names - set(FEATURES)):
        raise InvalidInputError(f"unknown feature {unknown[0]!r}; there are {', '.join(FEATURES)}", field="features")
    return names


def features_of(policy: str, text: str) -> frozenset[str]:
    """The mechanisms in force: all of them for `modm-plus` unless some are named, none for the others unless named."""
    named = check_features(text)
    return named or (frozenset(FEATURES) if policy == "modm-plus" else frozenset())


def parameters(request: SubmitRequest) -> str:
    """What an image is drawn with beside prompt and seed, as text that is equal where that is; "" for the defaults."""
    names = ("negative_prompt", "size", "num_inference_steps", "guidance_scale")
    asked = {name: value for name in names if (value := getattr(request, name)) is not None and value != ""}
    return json.dumps(asked) if asked else ""


def sized(text: str) -> bool:
    """Whether ``parameters`` names a size of its own."""
    return bool(text) and "size" in json.loads(text)


def route(given: RouteInput) -> Decision:
    """Decide. A reason in words comes with it."""
    request = given.request
    if given.policy == "large-only":
        return _miss(given, "policy large-only")
    if given.policy == "small-only":
        return Decision(
            route=Route.SMALL_REFINE, policy=given.policy, reason="policy small-only: drawn by the small model"
        )
    if request.cache in {"bypass", "refresh"}:
        return _miss(given, f"cache={request.cache}")
    if (stored := _stored(given)) is not None:
        return stored
    hit = _hit(given)
    wait = _wait(given, hit)
    if wait is not None:
        return wait
    if hit is not None:
        return hit
    if given.found is None:
        return _miss(given, "nothing of this size is cached")
    return _miss(given, f"best similarity {given.found.similarity:.3f} is below {_threshold(given):.3f}")


def _threshold(given: RouteInput) -> float:
    floor = given.ladder.lowered(given.lowered_rungs).threshold
    return max(floor, given.request.min_similarity or 0.0)


def _miss(given: RouteInput, reason: str) -> Decision:
    similarity = given.found.similarity if given.found else None
    return Decision(route=Route.LARGE_GEN, policy=given.policy, similarity=similarity, reason=f"miss: {reason}")


def skipped_steps(given: RouteInput, similarity: float) -> int | None:
    """k in steps of this request's own T: the ladder's k is of 50 steps and scales with it. None = miss."""
    if similarity < _threshold(given):
        return None
    rung = given.ladder.lowered(given.lowered_rungs).lookup(similarity)
    if rung is None:
        return None
    return _own_steps(given, rung.skipped_steps)


def _own_steps(given: RouteInput, k: int) -> int:
    """Steps of the ladder's T as steps of the request's own; at least one is left to draw."""
    total = given.request.num_inference_steps or given.total_steps
    return min(total - 1, round(k * total / given.ladder.num_inference_steps))


def _verify_floor(given: RouteInput, similarity: float) -> float | None:
    """The floor of the rung that the similarity is on; None = not to be verified."""
    if "verify" not in given.features:
        return None
    rung = given.ladder.lowered(given.lowered_rungs).lookup(similarity)
    return NO_FLOOR if rung is None or rung.verify_floor is None else rung.verify_floor


def _stored(given: RouteInput) -> Decision | None:
    found = given.found
    if "repeats" not in given.features or found is None or not (found.same_prompt and found.same_seed):
        return None
    return Decision(
        route=Route.STORED, policy=given.policy, source_id=found.id, source_uri=found.uri, source_depth=found.depth,
        similarity=found.similarity, reason="exact repeat: same prompt, seed and size; the stored image is the answer",
    )  # fmt: skip


def _hit(given: RouteInput) -> Decision | None:
    found = given.found
    if found is None:
        return None
    k = skipped_steps(given, found.similarity)
    if k is None:
        return None
    note = ""
    bound = _own_steps(given, given.repeat_max_k)
    if "repeats" in given.features and found.same_prompt and given.request.seed is None and k > bound:
        k, note = bound, "; repeat without a seed, so k is bounded for variety"
    return Decision(
        route=Route.SMALL_REFINE, policy=given.policy, skipped_steps=k, source_id=found.id, source_uri=found.uri,
        source_depth=found.depth, similarity=found.similarity, verify_floor=_verify_floor(given, found.similarity),
        reason=f"hit: similarity {found.similarity:.3f} skips {k} steps{note}",
    )  # fmt: skip


def _wait(given: RouteInput, hit: Decision | None) -> Decision | None:
    """Wait on an unfinished source where its rung is better and refining it costs less GPU time than the other way.

    Waiting holds no worker, so cost decides: the source is drawn anyway. Not where the chain is too deep already. While
    workers stand idle the saved work is nobody's gain, so a hit is taken at once and a miss waits only where its image
    comes within IDLE_PATIENCE times the time that it would take. Under load a weak hit waits for a better rung as long
    as that makes it later by at most one large image. Bounds from the model on DiffusionDB prompts: docs/policies.md.
    """
    source = given.unfinished
    if "inflight" not in given.features or source is None or source.chain_depth + 1 > given.wait_depth:
        return None
    k = skipped_steps(given, source.predicted)
    if k is None:
        return None
    total = given.request.num_inference_steps or given.total_steps
    finish_s = source.ready_in_s + given.small_service_s * (1 - k / total)
    idle = given.miss_wait_s <= 0
    if hit is not None and given.found is not None:
        now_s = given.small_service_s * (1 - hit.skipped_steps / total)
        # The rung counts, not a k that was bounded for variety: that bound would hold after waiting too.
        if (
            k <= (skipped_steps(given, given.found.similarity) or 0)
            or idle
            or finish_s >= given.miss_wait_s + now_s + given.large_service_s
        ):
            return None
    elif idle and finish_s > IDLE_PATIENCE * given.large_service_s > 0:
        return None
    return Decision(
        route=Route.SMALL_REFINE, policy=given.policy, skipped_steps=k, predicted_similarity=source.predicted,
        waits_on=source.id, reason=f"waits on {source.id}: predicted similarity {source.predicted:.3f} skips {k} steps",
    )  # fmt: skip


def rank(given: RouteInput, *, accepted_s: float, deadline_s: float, service_s: float) -> float:
    """Order within a queue, lower first: first come first served, or by slack under `deadline`."""
    if "deadline" not in given.features or deadline_s <= 0:
        return accepted_s
    return slack_rank(accepted_s=accepted_s, deadline_s=deadline_s, service_s=service_s)


def slack_rank(*, accepted_s: float, deadline_s: float, service_s: float) -> float:
    """Deadline order that yields: the deadline, later by YIELD times the service time.

    Plain slack order (minus the service time) draws misses first, and a late miss makes several hits late: 25 % broken
    SLOs against 15 % in the model at 8 requests a minute (docs/policies.md). It ages by itself: what comes later than
    YIELD times the difference in service time passes nobody. A request whose own deadline is looser goes later.
    """
    return accepted_s + deadline_s + YIELD * service_s


def hastened(rank: float, *, saved_s: float, n_workers: int) -> float:
    """The rank of a source that others wait on: earlier by the time that the saved work takes all workers together."""
    return rank - saved_s / max(1, n_workers)
