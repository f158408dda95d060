"""Gathers what the pure router needs (cache search, open requests, learned times), asks it, and notes what was used."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from modm_tasks.errors import SourceImageError
from modm_tasks.ledger import Ledger
from modm_tasks.messages import Completion, Decision, RequestRecord, Route, State
from modm_tasks.settings import Settings
from orchestrator.decisions import routing
from orchestrator.decisions.ladder import Ladder
from orchestrator.open_requests import SETTLED, OpenRequest, OpenRequests, Vector
from orchestrator.sources import Sources, is_repeat
from vector_store.cache import ImageCache
from vector_store.entries import ImageEntry, Match, Use

log = logging.getLogger(__name__)

#: Learned figures are read again after this long; a decision must not cost five reads of Redis.
FRESH_S = 1.0


class Router:
    """One per orchestrator. Thread-safe: the pipeline and the admission both ask."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        cache: ImageCache,
        ladder: Ladder,
        *,
        observe_hit_age: Callable[[float], None] | None = None,
    ) -> None:
        self.observe_hit_age = observe_hit_age
        self.settings, self.ledger, self.cache, self.ladder = settings, ledger, cache, ladder
        self.open_requests = OpenRequests(cache.dim)
        self.sources = Sources(settings, cache, ladder, self.write_uses)
        self._lock = threading.Lock()
        self._uses: list[Use] = []
        self._read_at = float("-inf")
        self._large_s = self._small_s = self._wait_s = 0.0
        self._lowered = 0
        self._workers = 1

    # --- decisions ----------------------------------------------------------------------------------------------

    def look_ahead(self, asked: Sequence[tuple[RequestRecord, Vector]]) -> dict[str, list[Match]]:
        """What `decide` will look for in the cache, by request id, for several requests in one search. Those that are not
        here look for themselves."""
        searching = [(r, v, self.features(r)) for r, v in asked if self._searches(r)]
        return self.sources.near_each(searching)

    def decide(
        self,
        record: RequestRecord,
        vector: Vector,
        *,
        inflight: bool = True,
        stored: bool = True,
        near: Sequence[Match] | None = None,
    ) -> Decision:
        """Decide a request by its text vector. ``near``: of `look_ahead`. That the chosen source is used is noted, and
        stored by the next `write_uses`."""
        given = self._given(record, vector, inflight=inflight, stored=stored, near=near)
        decision = routing.route(given)
        if decision.source_id is not None and decision.waits_on is None:
            self._note_use(decision.source_id, record.request.namespace, decision.skipped_steps)
        return decision

    def after_wait(
        self, record: RequestRecord, vector: Vector, source: RequestRecord | None, *, stored: bool = True
    ) -> Decision:
        """The source has ended: its true similarity decides, together with whatever else is cached by now."""
        predicted = record.decision.predicted_similarity if record.decision else None
        decision = self.decide(record, vector, inflight=False, stored=stored)
        ended = "gone" if source is None else source.state.value
        note = f"after waiting (source {ended}, predicted {predicted or 0.0:.3f}): {decision.reason}"
        return decision.model_copy(update={"predicted_similarity": predicted, "reason": note})

    def rebind(self, record: RequestRecord, vector: Vector, source: ImageEntry, similarity: float) -> Decision | None:
        """A queued request looked at again because of a new image: a decision where that saves more steps, else None.

        The images cached before have been looked at before, so the new one is the only candidate: no search.
        """
        if not self._searches(record):
            return None
        if "drift" in self.features(record) and source.depth > self.settings.cache.max_depth:
            return None
        given = self._given(
            record, vector, inflight=False, stored=False, match=Match(entry=source, similarity=similarity)
        )
        decision = routing.route(given)
        bound = record.decision
        bound_k = -1 if bound is None or bound.source_id is None else bound.skipped_steps
        if decision.source_id is None or decision.skipped_steps <= bound_k:
            return None
        self._note_use(source.id, source.namespace, decision.skipped_steps)
        return decision.model_copy(update={"reason": f"late binding: {decision.reason}"})

    def late_candidates(self, finished: RequestRecord, image_vector: Vector) -> list[tuple[OpenRequest, Vector, float]]:
        """Queued requests that the new image may serve better, most similar first."""
        found = self.open_requests.better_by(
            image_vector,
            thresholds=[rung.min_similarity for rung in self.ladder.rungs],
            namespace=finished.request.namespace,
            size=finished.request.size,
            client=self.sources.client(finished),
        )
        out = []
        for item, similarity in found:
            kept = self.open_requests.get(item.id)
            if kept is not None:
                out.append((item, kept[1], similarity))
        return out

    def late_rung(self, record: RequestRecord, decision: Decision | None) -> int:
        """``OpenRequest.rung`` of a request so decided."""
        if decision is None or decision.waits_on is not None or "late-binding" not in self.features(record):
            return SETTLED
        return 0 if decision.source_id is None else self.ladder.reached(decision.similarity or 0.0)

    def rank(self, record: RequestRecord, decision: Decision) -> float | None:
        """The place in the queue; None keeps the order of acceptance."""
        if "deadline" not in self.features(record):
            return None
        self._refresh()
        service = self._large_s if decision.route is Route.LARGE_GEN else self._small_s
        deadline = record.request.deadline_s or self.settings.slo.multiple * self._large_s
        if deadline <= 0:
            return None
        return routing.slack_rank(accepted_s=record.accepted_s, deadline_s=deadline, service_s=service)

    def hasten(self, decision: Decision) -> None:
        """A source that others wait on moves forward by the work it saves; what it waits on itself inherits that."""
        self._refresh()
        total = self.settings.num_inference_steps
        saved_s = max(0.0, self._large_s - self._small_s * (1 - decision.skipped_steps / total))
        source_id = decision.waits_on
        for _ in range(self.settings.routing.wait_depth + 1):
            if source_id is None:
                return
            source = self.ledger.get(source_id)
            if source.state is State.QUEUED:
                rank = routing.hastened(source.rank, saved_s=saved_s, n_workers=self._workers)
                self.ledger.set_rank(source_id, rank)
            if source.state is not State.WAITING:
                return
            source_id = self.ledger.field(source_id, "waits_on")

    def turn_is_ahead(self, record: RequestRecord) -> bool:
        """Whether an earlier request still waits for a worker. Then this one would not be drawn either, so waiting costs
        it nothing: a bound counted from now would undo in-flight reuse exactly at saturation."""
        heads = (self.ledger.ready(route.value, limit=1) for route in (Route.LARGE_GEN, Route.SMALL_REFINE))
        return any(head and head[0][1] < record.rank for head in heads)

    def stored_completion(self, record: RequestRecord, decision: Decision) -> Completion | None:
        """What an exact repeat is answered with: the stored image under the new id; None where it is unreadable."""
        entry = self.cache.get(decision.source_id or "", record.request.namespace)
        if entry is None:
            return None
        try:
            self.cache.images.read(entry.uri)  # a file that is there may still be cut short
        except SourceImageError:
            return None
        width, height = (int(side) for side in entry.size.split("x"))
        return Completion(
            uri=entry.uri, width=width, height=height, seed=entry.seed, model=entry.model, steps_run=0,
            skipped_steps=self.settings.num_inference_steps, depth=entry.depth, gpu_s=0.0, vector="",
            embedder=self.cache.embedder_identity, bytes=entry.bytes,
        )  # fmt: skip

    def _note_use(self, image_id: str, namespace: str, skipped_steps: int) -> None:
        with self._lock:
            self._uses.append(Use(id=image_id, namespace=namespace, at_s=self.now_s(), skipped_steps=skipped_steps))

    def write_uses(self, *, at_least: int = 1) -> None:
        """Store the uses that were noted, if there are so many: the store is called once for all of them."""
        with self._lock:
            if len(self._uses) < at_least:
                return
            uses, self._uses = self._uses, []
        for age_s in self.cache.touch(uses):
            if self.observe_hit_age is not None:
                self.observe_hit_age(age_s)

    # --- inputs -------------------------------------------------------------------------------------------------

    def policy(self, record: RequestRecord) -> str:
        return record.request.policy or self.settings.routing.policy

    def features(self, record: RequestRecord) -> frozenset[str]:
        """The mechanisms in force for a request: its own, else the settings'."""
        named = record.request.features
        return routing.features_of(self.policy(record), self.settings.routing.features if named is None else named)

    def now_s(self) -> float:
        return time.time()

    def _searches(self, record: RequestRecord) -> bool:
        return self.policy(record) not in {"large-only", "small-only"} and record.request.cache in {"auto", "no-store"}

    def _given(
        self,
        record: RequestRecord,
        vector: Vector,
        *,
        inflight: bool,
        stored: bool,
        match: Match | None = None,
        near: Sequence[Match] | None = None,
    ) -> routing.RouteInput:
        request, policy, features = record.request, self.policy(record), self.features(record)
        self._refresh()
        searching = self._searches(record)
        if match is None and searching:
            match = self.sources.best(record, vector, features, near)
        waiting = searching and inflight and "inflight" in features and not self._best_possible(record, match)
        unfinished = self._unfinished(record, vector) if waiting else None
        return routing.RouteInput(
            request=request,
            policy=policy,
            features=features if stored else features - {"repeats"},
            ladder=self.ladder,
            total_steps=request.num_inference_steps or self.settings.num_inference_steps,
            found=None if match is None else self._found(record, match),
            unfinished=unfinished,
            large_service_s=self._large_s,
            small_service_s=self._small_s,
            miss_wait_s=self._wait_s,
            lowered_rungs=self._lowered,
            repeat_max_k=self.settings.routing.repeat_max_k,
            wait_depth=self.settings.routing.wait_depth,
        )

    @staticmethod
    def _found(record: RequestRecord, match: Match) -> routing.Found:
        entry, request = match.entry, record.request
        return routing.Found(
            id=entry.id,
            uri=entry.uri,
            similarity=match.similarity,
            depth=entry.depth,
            same_prompt=entry.prompt == request.prompt,
            same_seed=is_repeat(request, entry),
        )

    def _best_possible(self, record: RequestRecord, match: Match | None) -> bool:
        """Whether no open request could promise a better rung than the image that is there."""
        if match is None or match.similarity < (record.request.min_similarity or 0.0):
            return False
        return self.ladder.reached(match.similarity) == len(self.ladder.rungs)

    def _unfinished(self, record: RequestRecord, vector: Vector) -> routing.Unfinished | None:
        """The open request whose image promises most. Text-to-text cosine predicts text-to-image by the ladder's map."""
        found = self.open_requests.most_similar(
            vector,
            namespace=record.request.namespace,
            size=record.request.size,
            client=self.sources.client(record),
            before=record.accepted_s,
            limit=8,
        )
        usable = [(i, s) for i, s in found if i.id != record.id and i.chain_depth < self.settings.routing.wait_depth]
        if not usable:
            return None
        item, text_similarity = usable[0]
        return routing.Unfinished(
            id=item.id,
            predicted=self.ladder.predict(text_similarity),
            ready_in_s=self._ready_in_s(item),
            chain_depth=item.chain_depth,
        )

    def _ready_in_s(self, item: OpenRequest) -> float:
        """Roughly when an open request's image is there: its own queue wait still ahead, and its drawing."""
        waited = max(0.0, self.now_s() - item.order)
        service = self._large_s if item.is_miss else self._small_s
        return max(0.0, self._wait_s - waited) + service

    def _refresh(self) -> None:
        with self._lock:
            if time.monotonic() - self._read_at < FRESH_S:
                return
            steps, counts, control = self.ledger.step_s(), self.ledger.counts(), self.ledger.control()
            total = self.settings.num_inference_steps
            self._large_s = self.settings.slo.large_latency_s or steps.get(self.settings.large_model, 0.0) * total
            self._small_s = steps.get(self.settings.small_model, 0.0) * total
            workers = self._workers = max(1, len(self.ledger.workers()))
            work = counts["ready:large-gen"] * self._large_s + counts["ready:small-refine"] * self._small_s * 0.6
            self._wait_s = work / workers
            self._lowered = min(control.degradation, self.settings.slo.floor_threshold_rungs)
            self._read_at = time.monotonic()
