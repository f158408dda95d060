"""`modm submit` and `modm submit-trace`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from modm_tasks.output import handle_errors, note, print_json

POLL_S = 30.0


@handle_errors
def submit(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same image.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; default: the large model's own.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Steps of a full image.")] = None,
    cache: Annotated[str, typer.Option(help="auto | bypass | refresh | no-store")] = "auto",
    namespace: Annotated[str, typer.Option(help="Cache namespace.")] = "default",
    policy: Annotated[str | None, typer.Option(help="Router policy of this request.")] = None,
    deadline_s: Annotated[float | None, typer.Option(min=0.001, help="Service-level objective.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the PNG goes.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the image.")] = True,
    json: Annotated[bool, typer.Option("--json", help="The whole record as JSON.")] = False,
) -> None:
    """Draw one prompt. Prints the request's id, or the path of the image."""
    from modm_tasks.client import Client
    from modm_tasks.errors import EngineError, InvalidInputError
    from modm_tasks.messages import FINAL, RequestRecord, State
    from modm_tasks.settings import load_settings

    if output is not None and not output.absolute().parent.is_dir():
        raise InvalidInputError(f"--output: no folder {output.absolute().parent}", field="output")
    body = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "size": size,
        "num_inference_steps": steps,
        "cache": cache,
        "namespace": namespace,
        "policy": policy,
        "deadline_s": deadline_s,
    }
    with Client.from_settings(load_settings()) as client:
        record = RequestRecord.model_validate(client.post("/v1/requests", json=body))
        began = time.monotonic()
        while (wait or output is not None) and record.state not in FINAL:
            record = RequestRecord.model_validate(client.get(f"/v1/requests/{record.id}", wait_s=POLL_S))
            if record.state not in FINAL:
                note(f"{record.state.value}, step {record.step}, {time.monotonic() - began:.0f} s")
        if record.state in FINAL and record.state is not State.DONE:
            raise EngineError(f"request {record.id} {record.state.value}: {record.error or 'no reason noted'}")
        if output is not None:
            client.download(f"/v1/requests/{record.id}/image", output)
    if json:
        print_json(record.model_dump(mode="json"))
    elif output is not None:
        typer.echo(str(output))
    else:
        typer.echo(record.id)
    if record.decision is not None and record.latency_s is not None:
        note(f"{record.decision.route.value}: {record.decision.reason}; {record.latency_s:.2f} s")
