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


@handle_errors
def submit_trace(
    trace: Annotated[Path, typer.Argument(help="JSONL, plain text, or a published trace (`modm trace inspect`).")],
    format: Annotated[str | None, typer.Option(help="Trace format; default: detected.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts for traces that have none.")] = None,
    start: Annotated[int, typer.Option(min=0, help="Rows to pass over.")] = 0,
    num_requests: Annotated[int | None, typer.Option(min=1, help="Rows to send, warm-up not counted.")] = None,
    slice_name: Annotated[str | None, typer.Option("--slice", help="reference | reference-warm")] = None,
    skip_bad_rows: Annotated[bool, typer.Option(help="Count malformed rows instead of stopping.")] = False,
    arrivals: Annotated[
        str, typer.Option(help="closed | recorded | burst | poisson | rising | fluctuating")
    ] = "closed",
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Users of the closed loop.")] = 2,
    rate_per_min: Annotated[float | None, typer.Option(min=0.001, help="Rate (poisson), or peak rate.")] = None,
    speed: Annotated[float, typer.Option(min=0.001, help="Recorded times are divided by this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 42,
    warm_up: Annotated[int, typer.Option(min=0, help="Rows that go first, to the large model, not counted.")] = 0,
    cache_directory: Annotated[Path | None, typer.Option(help="Images with captions, imported before the run.")] = None,
    image_directory: Annotated[Path | None, typer.Option(help="Where to copy the results.")] = None,
    policy: Annotated[str | None, typer.Option(help="modm | modm-plus | large-only | small-only")] = None,
    features: Annotated[str | None, typer.Option("--with", help="modm-plus mechanisms, comma-separated.")] = None,
    allocation: Annotated[str | None, typer.Option(help="Controller policy of this run.")] = None,
    workers: Annotated[str | None, typer.Option(help="pooled | roles")] = None,
    namespace: Annotated[str, typer.Option(help="Cache namespace.")] = "default",
    deadline_s: Annotated[float | None, typer.Option(min=0.001, help="SLO of each request.")] = None,
    large_model: Annotated[str | None, typer.Option(help="Refuse unless the workers serve it; alias or name.")] = None,
    small_model: Annotated[str | None, typer.Option(help="Refuse unless the workers serve it; alias or name.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder of the report.")] = None,
    name: Annotated[str, typer.Option(help="Name of the run in reports.")] = "",
    direct: Annotated[bool, typer.Option(help="Embed, search and send from this process; no orchestrator.")] = False,
    json: Annotated[bool, typer.Option("--json", help="report.json on stdout.")] = False,
) -> None:
    """Replay a trace and report. Ctrl-C stops submitting and reports what was done."""
    from contextlib import ExitStack

    from modm_tasks.errors import InvalidInputError, ModmError
    from modm_tasks.output import table
    from modm_tasks.settings import load_settings
    from orchestrator.decisions.routing import check_features, check_policy
    from orchestrator.model_names import check_pair
    from orchestrator.report import tables
    from orchestrator.report.progress import shown
    from orchestrator.report.write import write_report
    from orchestrator.run_trace import RunPlan, run_trace, save_images
    from orchestrator.targets import open_target
    from orchestrator.traces.arrivals import KINDS
    from orchestrator.traces.load import load_trace

    if policy is not None:
        check_policy(policy)
    if features is not None:
        check_features(features)
    if arrivals not in (*KINDS, "closed"):
        raise InvalidInputError(
            f"unknown arrivals {arrivals!r}; there are closed, {', '.join(KINDS)}", field="arrivals"
        )
    wanted = None if num_requests is None else num_requests + warm_up
    loaded = load_trace(
        trace, format=format, start=start, num_requests=wanted, slice_name=slice_name, prompts=prompts,
        skip_bad_rows=skip_bad_rows, warm_up=warm_up,
    )  # fmt: skip
    for bad in loaded.skipped[:5]:
        note(f"row {bad.row} left out: {f'field {bad.field!r}: ' if bad.field else ''}{bad.reason}")
    if loaded.skipped:
        note(f"{len(loaded.skipped)} malformed rows left out")
    settings = load_settings()
    with ExitStack() as stack:
        target = open_target(settings, stack, direct=direct)
        check_pair(target.status(), settings, large=large_model, small=small_model)
        if cache_directory is not None:
            target.import_images(cache_directory, namespace, note)
        control = {k: v for k, v in (("mode", workers), ("allocation", allocation)) if v is not None}
        plan = RunPlan(
            rows=loaded.rows, arrivals=arrivals, concurrency=concurrency, rate_per_min=rate_per_min, speed=speed,
            seed=seed, warm_up=warm_up, policy=policy, features=features, namespace=namespace, deadline_s=deadline_s,
            name=name, control=control,
        )  # fmt: skip
        run = run_trace(target, plan, shown=shown, sheet=report is not None)
        if image_directory is not None and not run.result.interrupted:
            save_images(target, run.result.records, image_directory)
    if report is not None:
        write_report(report, run.report, run.result.records, sheet=run.sheet)
        note(f"report: {report / 'index.html'}")
    if json:
        print_json(run.report)
    else:
        table(["", *tables.names([run.report])], tables.rows([run.report]))
    if run.result.interrupted:
        raise KeyboardInterrupt
    if run.report["requests"]["lost"]:
        raise ModmError(f"{run.report['requests']['lost']} requests were lost")
