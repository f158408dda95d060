"""`modm cache ...`: a thin HTTP client of the orchestrator. Data on stdout, progress on stderr; heavy imports
inside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modm_tasks.errors import InvalidInputError
from modm_tasks.output import handle_errors, note, print_json
from vector_store import cli_print as show

if TYPE_CHECKING:
    from modm_tasks.client import Client

cache_app = typer.Typer(no_args_is_help=True, help="The image cache.", rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Space = Annotated[str, typer.Option("--namespace", help="Namespace of the cache.")]
AnySpace = Annotated[str | None, typer.Option("--namespace", help="Namespace; all where none is given.")]
LONG_S = 3600.0


@contextmanager
def _client(timeout_s: float = 60.0) -> Iterator[Client]:
    from modm_tasks.client import Client
    from modm_tasks.settings import load_settings

    with Client.from_settings(load_settings(), timeout_s=timeout_s) as client:
        yield client


@cache_app.command()
@handle_errors
def stats(namespace: AnySpace = None, as_json: Json = False) -> None:
    """Size, capacity, uses by steps skipped, age of hits, disk, depth."""
    with _client() as client:
        answer = client.get("/v1/cache/stats", namespace=namespace)
    print_json(answer) if as_json else show.stats(answer)


@cache_app.command("list")
@handle_errors
def list_(
    namespace: Space = "default",
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    client_name: Annotated[str | None, typer.Option("--client", help="Only this client's images.")] = None,
    as_json: Json = False,
) -> None:
    """The newest images. --json prints one object a line."""
    left, before = limit, None
    with _client() as client:
        if not as_json:
            show.entry_header()
        while left > 0:
            page = client.get(
                "/v1/cache/entries", namespace=namespace, limit=min(left, 500), before_seq=before, client=client_name
            )
            show.entries(page["entries"], as_json=as_json)
            left, before = left - len(page["entries"]), page["next"]
            if before is None:
                return


@cache_app.command()
@handle_errors
def search(
    query: Annotated[str, typer.Argument(help="A text, or the path of an image.", metavar="TEXT|IMAGE")],
    namespace: Space = "default",
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 10,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet: .html or .png.")] = None,
    as_json: Json = False,
) -> None:
    """The images nearest to a text or to an image."""
    from vector_store.folder import SUFFIXES

    path = Path(query) if len(query) < 1000 and Path(query).suffix.lower() in SUFFIXES else None
    if path is not None and not path.is_file():
        raise InvalidInputError(f"there is no image {query}", field="query")
    with _client() as client:
        if path is not None:
            form = {"namespace": namespace, "limit": limit}
            matches = client.upload("/v1/cache/search/image", {"file": path}, form)["matches"]
        else:
            body = {"text": query, "namespace": namespace, "limit": limit}
            matches = client.post("/v1/cache/search", body)["matches"]
        if sheet is not None:
            from vector_store.sheet import write_sheet

            def image(entry: dict[str, Any]) -> bytes:
                return client.bytes(f"/v1/cache/entries/{entry['id']}/image", namespace=namespace)

            write_sheet(sheet, query, [(entry, image(entry)) for entry in matches])
            note(f"contact sheet: {sheet}")
    if not as_json:
        show.entry_header(similarity=True)
    show.entries(matches, as_json=as_json, similarity=True)


@cache_app.command("import")
@handle_errors
def import_(
    folder: Annotated[Path, typer.Argument(help="Images with captions.jsonl, .txt files or speaking names.")],
    namespace: Space = "default",
    as_json: Json = False,
) -> None:
    """Fill the cache from a folder. Run again, it goes on where it stopped; what is unreadable is listed."""
    from vector_store.remote import import_over_http

    with _client(timeout_s=600.0) as client, show.progress_line("importing") as line:
        report = import_over_http(client, folder, namespace=namespace, progress=line)
    if as_json:
        print_json(report.as_json())
        return
    for problem in report.problems:
        note(f"not imported: {problem.file}: {problem.reason}")
    typer.echo(f"imported {report.imported}, in the cache before {report.skipped}, not imported {len(report.problems)}")


@cache_app.command()
@handle_errors
def export(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")], namespace: Space = "default"
) -> None:
    """Write images and captions.jsonl to a folder that `import` takes."""
    from vector_store.archive import unpack_export

    tar = folder.with_name(f".{folder.name}.tar")
    with _client(timeout_s=LONG_S) as client:
        client.download("/v1/cache/export", tar, namespace=namespace)
    try:
        images = unpack_export(tar, folder)
    finally:
        tar.unlink(missing_ok=True)
    typer.echo(f"exported {images} images to {folder}")


@cache_app.command()
@handle_errors
def evict(
    older_than: Annotated[str | None, typer.Option(help="Made longer ago than this: 90s, 30m, 12h, 7d.")] = None,
    below: Annotated[float | None, typer.Option(min=0, help="Steps saved so far are fewer than this.")] = None,
    keep: Annotated[int | None, typer.Option(min=0, help="All but the best so many of the eviction policy.")] = None,
    namespace: Space = "default",
    as_json: Json = False,
) -> None:
    """Evict by hand, by one of three rules. Images that a request needs stay."""
    age_s = None if older_than is None else parse_age_s(older_than)
    body = {"namespace": namespace, "older_than_s": age_s, "below": below, "keep": keep}
    with _client(timeout_s=600.0) as client:
        answer = client.post("/v1/cache/evict", body)
    print_json(answer) if as_json else typer.echo(f"evicted {answer['evicted']}")


@cache_app.command()
@handle_errors
def clear(
    namespace: Space = "default", yes: Annotated[bool, typer.Option("--yes", help="Really delete.")] = False
) -> None:
    """Delete every image of a namespace."""
    if not yes:
        raise InvalidInputError(f"this deletes every image of namespace {namespace!r}; add --yes", field="yes")
    with _client(timeout_s=600.0) as client:
        answer = client.post("/v1/cache/clear", {"namespace": namespace, "yes": True})
    typer.echo(f"cleared {answer['cleared']}")


@cache_app.command()
@handle_errors
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is wrong.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every image, too.")] = False,
    namespace: AnySpace = None,
    as_json: Json = False,
) -> None:
    """Compare vectors with files. Exit code 1 when something is wrong and not repaired."""
    with _client(timeout_s=LONG_S) as client:
        answer = client.post("/v1/cache/verify", {"namespace": namespace, "repair": repair, "deep": deep})
    print_json(answer) if as_json else show.verify(answer)
    if not answer["clean"] and not repair:
        raise typer.Exit(1)


@cache_app.command()
@handle_errors
def snapshot(file: Annotated[Path, typer.Argument(help="A .tar to write.")], namespace: AnySpace = None) -> None:
    """Write vectors, records and images to one file, and check it."""
    from vector_store.archive import check

    with _client(timeout_s=LONG_S) as client:
        client.download("/v1/cache/snapshot", file, namespace=namespace)
    members = check(file)
    typer.echo(f"wrote {file}: {members} members, {file.stat().st_size / 2**20:.1f} MiB, checksums good")


@cache_app.command()
@handle_errors
def restore(
    file: Annotated[Path, typer.Argument(help="A file that `snapshot` wrote.")],
    replace: Annotated[bool, typer.Option("--replace", help="Empty its namespaces first.")] = False,
    as_json: Json = False,
) -> None:
    """Read a snapshot back. A broken file changes nothing."""
    with _client(timeout_s=LONG_S) as client:
        answer = client.upload("/v1/cache/restore", {"file": file}, {"replace": replace})
    if as_json:
        print_json(answer)
        return
    for namespace, images in answer["restored"].items():
        typer.echo(f"restored {images} images of namespace {namespace}")


@cache_app.command()
@handle_errors
def reindex(
    namespace: AnySpace = None,
    keep_old: Annotated[bool, typer.Option("--keep-old", help="Keep the old embedder's vectors.")] = False,
    as_json: Json = False,
) -> None:
    """After the embedder has changed: embed another embedder's images anew, then switch. Run again, it goes on."""
    states: list[dict[str, Any]] = []
    with _client(timeout_s=600.0) as client, show.progress_line("embedding") as line:
        while True:
            answer = client.post("/v1/cache/reindex", {"namespace": namespace, "keep_old": keep_old})
            state = answer["state"]
            if state is None:
                break
            line.show(state["done"] + state["unreadable"], state["total"])
            if state["finished"]:
                states.append(state)
                if namespace is not None or not answer["left"]:
                    break
    if as_json:
        print_json(states)
        return
    for state in states:
        typer.echo(f"{state['namespace']}: {state['done']} images embedded, {state['unreadable']} unreadable")
    if not states:
        typer.echo("nothing to do: no other embedder's images")


@cache_app.command()
@handle_errors
def purge(
    image: Annotated[str | None, typer.Option(help="Id of an image.")] = None,
    client_name: Annotated[str | None, typer.Option("--client", help="Every image of this client.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Every image of this prompt.")] = None,
    namespace: AnySpace = None,
    as_json: Json = False,
) -> None:
    """Delete images and everything that was refined from them."""
    body = {"namespace": namespace, "image": image, "client": client_name, "prompt": prompt}
    with _client(timeout_s=600.0) as client:
        answer = client.post("/v1/cache/purge", body)
    print_json(answer) if as_json else typer.echo(f"purged {answer['purged']}")


@cache_app.command()
@handle_errors
def simulate(
    trace: Annotated[Path | None, typer.Argument(help="Prompts: text, one a line, or JSONL with `prompt`.")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="Unit vectors, .npy [n, dim], instead of a trace.")] = None,
    sizes: Annotated[str, typer.Option(help="Cache sizes.")] = "100,300,1000",
    policies: Annotated[str, typer.Option(help="Of fifo, lru, utility, static.")] = "fifo,lru,utility",
    insert: Annotated[str, typer.Option(help="all, or miss: which images enter.")] = "all",
    ladder: Annotated[str, typer.Option(help="cosine:k, best first.")] = "0.95:30,0.90:25,0.85:15,0.80:10,0.75:5",
    window: Annotated[int, typer.Option(min=1, help="Requests a point of the hit rate over time.")] = 200,
    embedder: Annotated[str, typer.Option(help="Embedder of a trace; default: the one of the settings.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for CSV files and plots.")] = None,
    as_json: Json = False,
) -> None:
    """Replay prompts through the eviction policies: hit rate, gap between source and hit, reuse."""
    from vector_store import simulate as sim

    plan = sim.make_plan(sizes=sizes, policies=policies, insert=insert, ladder=ladder, window=window)
    vectors = sim.load_vectors(trace, embeddings, embedder)
    results = []
    with show.progress_line("replaying") as line:
        for number, result in enumerate(sim.run(vectors, plan), start=1):
            results.append(result)
            line.show(number, len(plan.policies) * len(plan.sizes))
    if out is not None:
        for path in sim.write(results, out):
            note(f"wrote {path}")
    print_json([r.summary() for r in results]) if as_json else show.simulation([r.summary() for r in results])


def parse_age_s(text: str) -> float:
    """``90s``, ``30m``, ``12h``, ``7d``, or plain seconds. Raises InvalidInputError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", text.strip())
    if match is None:
        raise InvalidInputError(f"{text[:40]!r} is no age; write 90s, 30m, 12h or 7d", field="older-than")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]
