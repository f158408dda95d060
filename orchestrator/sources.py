"""Which cached image a request is compared with: the nearest, or among those of a repeated prompt the right one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from modm_tasks.errors import InvalidInputError
from modm_tasks.messages import RequestRecord, SubmitRequest
from modm_tasks.settings import Settings
from orchestrator.decisions import routing
from orchestrator.decisions.ladder import Ladder
from orchestrator.open_requests import Vector
from vector_store.cache import ImageCache
from vector_store.entries import ImageEntry, Match

#: Images looked at for a repeat, and for a seeded one whose prompt has more variations than that.
FEW, MANY = 8, 256

Asked = tuple[RequestRecord, Vector, frozenset[str]]


class Sources:
    """Searches the cache as the mechanisms in force want it. ``write_uses`` tells the cache of the sources chosen so far."""

    def __init__(self, settings: Settings, cache: ImageCache, ladder: Ladder, write_uses: Callable[[], None]) -> None:
        self.settings, self.cache, self.ladder = settings, cache, ladder
        self._write_uses = write_uses

    def client(self, record: RequestRecord) -> str | None:
        """Whose images a request may use; None = everybody's."""
        return record.request.client if self.settings.cache.scope == "per-client" else None

    def near_each(self, asked: Sequence[Asked]) -> dict[str, list[Match]]:
        """The nearest images of each request, by its id, with one search for all that ask alike.

        A search that the store refuses is left out, so that each of its requests meets the refusal by itself.
        """
        alike: dict[tuple[str, str | None, str | None, int | None, int], list[Asked]] = defaultdict(list)
        for record, vector, features in asked:
            alike[self._space(record, features)].append((record, vector, features))
        out: dict[str, list[Match]] = {}
        for (namespace, size, client, max_depth, limit), group in alike.items():
            try:
                found = self.cache.search_each(
                    [vector for _, vector, _ in group], namespace=namespace, size=size, client=client,
                    max_depth=max_depth, exclude_ids=[[record.id] for record, _, _ in group], limit=limit,
                )  # fmt: skip
            except InvalidInputError:
                continue
            out |= {record.id: near for (record, _, _), near in zip(group, found, strict=True)}
        return out

    def best(
        self, record: RequestRecord, vector: Vector, features: frozenset[str], near: Sequence[Match] | None = None
    ) -> Match | None:
        """The image to be decided by. ``near``: of `near_each`; searched for where it is not given."""
        few = self._right_size(record, vector, features, self._space(record, features)[-1], near)
        if "repeats" not in features or not few:
            return next(iter(few), None)
        same = [m for m in few if m.entry.prompt == record.request.prompt]
        if record.request.seed is not None and len(same) == FEW:
            # The seed may be behind others.
            many = self._right_size(record, vector, features, MANY)
            same = [m for m in many if m.entry.prompt == record.request.prompt]
        exact = [m for m in same if is_repeat(record.request, m.entry)]
        if exact:
            return min(exact, key=lambda m: m.entry.depth)
        best = few[0]
        if best.entry.prompt != record.request.prompt or record.request.seed is not None:
            return best
        # Spread repeats over the sources that are as good as the best, least used first, so that variations vary.
        rung = self.ladder.lookup(best.similarity)
        if rung is None:
            return best
        self._write_uses()
        # Searched anew: what was found before does not know the uses since.
        few = self._right_size(record, vector, features, FEW)
        as_good = [m for m in few if self.ladder.lookup(m.similarity) == rung]
        return min(as_good, key=lambda m: m.entry.hits, default=best)

    def _right_size(
        self,
        record: RequestRecord,
        vector: Vector,
        features: frozenset[str],
        limit: int,
        near: Sequence[Match] | None = None,
    ) -> list[Match]:
        """Without those whose size was asked for, where this request asks for none: the refined image has its source's
        size, and the large model's own was asked for."""
        found = self._near(record, vector, features, limit) if near is None else list(near)
        if record.request.size is not None or not any(routing.sized(m.entry.parameters) for m in found):
            return found
        many = found if limit == MANY else self._near(record, vector, features, MANY)
        return [m for m in many if not routing.sized(m.entry.parameters)][:limit]

    def _near(self, record: RequestRecord, vector: Vector, features: frozenset[str], limit: int) -> list[Match]:
        namespace, size, client, max_depth, _ = self._space(record, features)
        return self.cache.search(
            vector, namespace=namespace, size=size, client=client, max_depth=max_depth, exclude_ids=[record.id],
            limit=limit,
        )  # fmt: skip

    def _space(
        self, record: RequestRecord, features: frozenset[str]
    ) -> tuple[str, str | None, str | None, int | None, int]:
        """(namespace, size, client, deepest source, how many): what searches must agree in to be made together."""
        max_depth = self.settings.cache.max_depth if "drift" in features else None
        limit = FEW if "repeats" in features else 1
        return record.request.namespace, record.request.size, self.client(record), max_depth, limit


def is_repeat(request: SubmitRequest, entry: ImageEntry) -> bool:
    """Whether a request for the prompt of a cached image is the one that it was the answer to, drawn or refined."""
    return request.seed is not None and entry.seed == request.seed and entry.parameters == routing.parameters(request)
