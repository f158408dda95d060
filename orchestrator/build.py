"""Puts a service together from the settings. The only place that knows every part."""

from __future__ import annotations

import logging
from collections.abc import Callable

from modm_tasks.app import make_app
from modm_tasks.errors import ConfigError
from modm_tasks.image_store import ImageStore
from modm_tasks.ledger import Ledger
from modm_tasks.settings import Settings
from orchestrator.admission import Admission
from orchestrator.decisions.ladder import PUBLISHED, Ladder, load_ladder
from orchestrator.limits import health_problems
from orchestrator.metrics import Observer
from orchestrator.model_names import named
from orchestrator.pipeline import Pipeline
from orchestrator.router import Router
from orchestrator.service import Parts, Service
from orchestrator.tokens import Tokens
from orchestrator.watchdog import Watchdog

log = logging.getLogger(__name__)


def choose_ladder(settings: Settings) -> Ladder:
    """The ladder of this embedder and refiner: a file from the settings, the bundled one, or the paper's for ViT-L/14.

    Thresholds mean nothing for another embedder (facts, section G), so an unknown one without a file is an error.
    """
    if settings.routing.ladder_file is not None:
        return _fitting(load_ladder(settings.routing.ladder_file), settings)
    if settings.embedder == "scenes-clip":
        from vector_store.embedder import bundled_folder

        folder = bundled_folder("scenes-clip")
        assert folder is not None
        return load_ladder(folder / "ladder.json")
    if settings.embedder in {"ViT-L-14/openai", "ViT-L-14-quickgelu/openai", "fake"}:
        return PUBLISHED
    raise ConfigError(
        f"no ladder is known for embedder {settings.embedder!r}: set MODM_ROUTING__LADDER_FILE "
        "(`modm calibrate` fits one)",
        field="routing.ladder_file",
    )


def _fitting(ladder: Ladder, settings: Settings) -> Ladder:
    """A ladder from a file, if it was fitted for this embedder; another's thresholds would make every prompt a hit, or none.

    A ladder for another refiner only skips too much or too little, so that is said and allowed.
    """
    from vector_store.embedder import embedder_identity

    if ladder.embedder != settings.embedder:
        whose = repr(ladder.embedder) if ladder.embedder else "no embedder that it names"
        raise ConfigError(
            f"the ladder file is for {whose}, not for {settings.embedder!r}; `modm calibrate` fits one",
            field="routing.ladder_file",
        )
    identity = embedder_identity(settings.embedder)
    if ladder.embedder_identity not in {"", identity}:
        raise ConfigError(
            f"the ladder file is for other weights of {settings.embedder!r} ({ladder.embedder_identity}, here {identity});"
            " `modm calibrate` fits one",
            field="routing.ladder_file",
        )
    if ladder.refiner not in {"", settings.small_model}:
        log.warning("the ladder file was fitted for %s, and %s refines", ladder.refiner, settings.small_model)
    return ladder


def build_service(settings: Settings, *, observer: Observer | None = None, apart: bool = False) -> Service:
    """A service that is ready to start. Raises ConfigError, UnavailableError or StoreInUseError.

    ``apart``: an embedded vector store works in a process of its own, so that it holds up nobody.
    """
    from vector_store.backends import open_backend
    from vector_store.cache import ImageCache
    from vector_store.embedder import load_embedder

    settings = named(settings)
    ledger = Ledger.from_settings(settings)
    ledger.now_s()  # fails here, with one line, where Redis is away
    ladder = choose_ladder(settings)
    images = ImageStore(settings.image_root)
    backend = open_backend(settings, apart=apart)
    try:
        embedder = load_embedder(settings.embedder)
        cache = ImageCache(backend, embedder.identity, embedder.dim, settings, images)
        app = make_app(settings)
        tokens = Tokens(app, ledger)
        hit_age = observer.hit_age if observer else None
        router = Router(settings, ledger, cache, ladder, observe_hit_age=hit_age)
        routed = observer.routed if observer else None
        finished = observer.finished if observer else None
        pipeline = Pipeline(ledger, embedder, router, tokens, observe=routed)
        admission = Admission(app, ledger, cache, pipeline, observe=finished)
        watchdog = Watchdog(ledger, tokens, pipeline, admission, cache, images)
    except BaseException:
        backend.close()
        raise
    parts = Parts(
        settings=settings,
        ledger=ledger,
        images=images,
        cache=cache,
        embedder=embedder,
        tokens=tokens,
        pipeline=pipeline,
        admission=admission,
        watchdog=watchdog,
    )
    problems: Callable[[], list[str]] = health_problems(settings, ledger)
    return Service(parts, health_problems=problems)
