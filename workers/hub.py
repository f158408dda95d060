"""The model hub: downloads, and one line for each way in which a model cannot be had."""

from __future__ import annotations

from collections.abc import Callable

from modm_tasks.errors import EngineError
from workers.catalogue import ModelEntry


def pull(entry: ModelEntry) -> str:
    """Download an entry's weights; returns the folder. Raises EngineError with one line."""
    if entry.folder is not None:
        return str(entry.folder)
    import diffusers

    try:
        path = diffusers.DiffusionPipeline.download(entry.repo, revision=entry.revision, variant=entry.variant)
        if entry.vae:
            from huggingface_hub import snapshot_download

            snapshot_download(entry.vae, allow_patterns=["*.json", "*.safetensors"])
    except Exception as error:
        raise EngineError(explain(entry, error)) from error
    return str(path)


def explain(entry: ModelEntry, error: BaseException) -> str:
    """One line that says what to do about a model that does not load."""
    from huggingface_hub import errors as hub

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    text = " ".join(str(e) for e in chain)
    who = f"model {entry.name!r}"
    cases: list[tuple[Callable[[], bool], str]] = [
        (
            lambda: any_of(hub.GatedRepoError) or ("gated repo" in text and not any_of(hub.RepositoryNotFoundError)),
            f"{who}: {entry.repo} is gated: accept its licence on the hub, then set HF_TOKEN",
        ),
        (
            lambda: any_of(hub.RevisionNotFoundError) or "is not a valid git identifier" in text,
            f"{who}: {entry.repo} has no revision {entry.revision!r}",
        ),
        (
            lambda: any_of(hub.RepositoryNotFoundError),
            f"{who}: there is no repository {entry.repo!r} (or it is private: set HF_TOKEN)",
        ),
        (
            lambda: entry.folder is None and any_of(hub.LocalEntryNotFoundError, ConnectionError, OSError),
            f"{who}: {entry.repo} is not in the local cache and the hub cannot be had;"
            f" run `modm models pull {entry.name}` where there is a network",
        ),
    ]
    for applies, line in cases:
        if applies():
            return line
    return f"{who}: cannot load {entry.source}: {type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """What an error says in its first line, at most 300 characters; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
