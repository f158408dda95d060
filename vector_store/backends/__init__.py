"""Where vectors live: one interface (`base`), the embedded engine (`edge`) and Qdrant's client (`client`)."""

from __future__ import annotations

from modm_tasks.errors import ConfigError
from modm_tasks.settings import Settings
from vector_store.backends.base import Filter, Point, Scored, VectorBackend, codes_for

__all__ = ["Filter", "Point", "Scored", "VectorBackend", "codes_for", "open_backend"]


def open_backend(settings: Settings, *, apart: bool = False) -> VectorBackend:
    """The store that ``qdrant_url`` names: ``edge:`` | ``local:DIR`` | ``memory:`` | ``http(s)://HOST:PORT``.

    ``apart``: the embedded engine gets a process of its own, for those who serve others meanwhile.

    Raises StoreInUseError where another process holds an embedded store, UnavailableError where a server does not
    answer, ConfigError for another form.
    """
    url = settings.qdrant_url
    quantisation = codes_for(settings.cache.quantisation, settings.cache.capacity)
    if url == "edge:":
        folder = settings.home / "vectors"
        if apart:
            from vector_store.backends.apart import ApartBackend

            return ApartBackend(folder, quantisation=quantisation)
        from vector_store.backends.edge import EdgeBackend

        return EdgeBackend(folder, quantisation=quantisation)
    if url == "memory:" or (url.startswith("local:") and len(url) > 6) or url.startswith(("http://", "https://")):
        from vector_store.backends.client import ClientBackend

        key = settings.qdrant_api_key
        return ClientBackend(url, api_key=key.get_secret_value() if key else None, quantisation=quantisation)
    raise ConfigError(
        f"qdrant_url {url!r} is none of edge: | local:DIR | memory: | http(s)://HOST:PORT", field="qdrant_url"
    )
