from __future__ import annotations

import json
import sys

import pytest
import typer
from typer.testing import CliRunner

from modm_tasks.settings import Settings, WorkerSettings
from workers.cli import models_app, run_all, start_queues, worker_argv, worker_command

runner = CliRunner()


def test_list_and_show_speak_json() -> None:
    listed = runner.invoke(models_app, ["list", "--json"])
    assert listed.exit_code == 0
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["FLUX.1-dev"]["guidance_scale"] == 3.5
    assert rows["scenes-large"]["ready"] is True
    shown = runner.invoke(models_app, ["show", "sana", "--json"])
    assert json.loads(shown.stdout)["name"] == "Sana_1600M_1024px_BF16"
    assert "FLUX.1-dev" in runner.invoke(models_app, ["list"]).stdout
    assert "Apache-2.0" in runner.invoke(models_app, ["show", "schnell"]).stdout


def test_an_unknown_model_is_one_line_and_a_usage_error() -> None:
    for command in ("show", "check", "pull"):
        result = runner.invoke(models_app, [command, "nope"])
        assert result.exit_code == 2
        assert "no model 'nope'" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_queues_at_the_start_follow_the_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.cli._desired", lambda settings, node: None)
    roles, pooled = Settings(), Settings(worker=WorkerSettings(mode="pooled"))
    assert start_queues(roles, "gpu0@%h", "0", "small") == ("small-refine",)
    assert start_queues(roles, "gpu0@%h", "0", "large") == ("large-gen", "small-refine")
    assert start_queues(pooled, "gpu1@%h", "1", "small") == ("small-refine", "large-gen")
    assert start_queues(roles, "gpu0@%h", "0", "auto") == ("large-gen", "small-refine")
    assert start_queues(roles, "gpu1@%h", "1", "auto") == ("small-refine", "large-gen")
    monkeypatch.setattr("workers.cli._desired", lambda settings, node: "small")
    assert start_queues(roles, "gpu0@%h", "0", "auto") == ("small-refine",)


def test_the_command_line_is_one_prefork_child() -> None:
    argv = worker_argv(Settings(), "gpu2@%h", ("small-refine",))
    assert argv[0] == sys.executable
    assert argv[argv.index("-n") + 1] == "gpu2@%h"
    assert argv[argv.index("-Q") + 1] == "small-refine"
    assert argv[argv.index("-P") + 1] == "prefork"
    assert argv[argv.index("-c") + 1] == "1"
    assert {"--without-gossip", "--without-mingle"} <= set(argv)


@pytest.mark.parametrize(("ends", "code"), [([0, 0], 0), ([0, 2], 2), ([0, -9], 137)])
def test_all_gpus_is_one_worker_each_and_one_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, ends: list[int], code: int
) -> None:
    started: list[list[str]] = []

    class Worker:
        """Has ended by itself, as ``ends`` says; nobody signalled it."""

        def __init__(self, argv: list[str]) -> None:
            self.end = ends[len(started)]
            started.append(argv)

        def wait(self) -> int:
            return self.end

    monkeypatch.setattr("workers.cli.gpu_count", lambda: 2)
    monkeypatch.setattr("workers.cli.subprocess.Popen", Worker)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert run_all("auto", Settings()) == code
    assert [argv[argv.index("--gpu") + 1] for argv in started] == ["0", "1"]
    assert all(argv[argv.index("--share") + 1] == "2" for argv in started)


def test_a_bad_role_or_model_never_starts_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(worker_command)

    def never(*_: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr("os.execvpe", never)
    monkeypatch.setenv("MODM_SMALL_MODEL", "scenes-small")
    for argv, says in ((["--role", "boss"], "role must be"), (["--large-model", "nope"], "no model 'nope'")):
        result = runner.invoke(app, argv)
        assert result.exit_code == 2
        assert says in result.stderr
