"""The examples of docs/operating.md on a real stack, in the order of the page, and the live view on a terminal.

Ids, host, times and the machine's own figures differ from run to run; all else must be what the page says. An id of the
page stands for the one that the run gave in its place.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modm_tasks.settings import load_settings
from ops.redis_server import RunningRedis
from tests.conftest import child_environment, fresh_database
from tests.support.processes import MODM, processes, run_modm, wait_until
from tests.support.stack import TestStack, start_stack

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "operating.md"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
FILE = re.compile(r"```\w+ file=(\S+)\n(.*?)```", re.DOTALL)
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
HOST = "gpu0@host"
#: What differs from run to run, as the page has it, and what may stand there.
VARIES = (
    (r"\d+ MiB", r"\d+ MiB"),
    (r"up \d+ s", r"up \d+ s"),
    (r"http://127\.0\.0\.1:\d+", r"http://127\.0\.0\.1:\d+"),
    (r"python: \S+", r"python: \S+"),
    (r"torch \S+ torchvision \S+", r"torch \S+ torchvision \S+"),
    (r"home: \S+,|MODM_HOME=\S+", r"(?:home: |MODM_HOME=)\S+"),
    (r"device: [^\n]*", r"device: [^\n]*"),
    (r"│ [\d.]* +│ \d+ +│", r"│ [\d.]* +│ \d+ +│"),  # latency and age
    (r"\d+\.\d (?=arrivals|images|s of)", r"\d+\.\d "),
    (r"\d+\.\d\d s", r"\d+\.\d\d s"),
    (r"\d+\.\d/min", r"\d+\.\d/min"),
    (r"│ \d+\.\d+(?: / \d+\.\d+)*\n", r"│ \d+\.\d+(?: / \d+\.\d+)*\n"),
    (r"│ [\d.]+ % / [\d.]+ %", r"│ (?:-|[\d.]+ %) / (?:-|[\d.]+ %)"),
    # Whether the first image was in time depends on whether the large model's time was known when it ended.
    (r"SLO +[\d.]+ %", r"SLO +(?:-|[\d.]+ %)"),
    (r"\n\.\.\.\n", r"\n(?:.*\n)*?"),
    (r"━+", r"━+"),
    (r"[ \t]+", r"[ \t]+"),
)
TOKEN = re.compile("|".join(f"(?P<v{i}>{found})" for i, (found, _) in enumerate(VARIES)) + f"|(?P<id>{UUID})")


def pattern(shown: str, known: dict[str, str]) -> tuple[re.Pattern[str], list[str]]:
    """(what output fits, ids of the page that it captures in order)."""
    out, at = "", 0
    new: list[str] = []
    for token in TOKEN.finditer(shown):
        out += re.escape(shown[at : token.start()])
        at = token.end()
        if token["id"] is None:
            out += VARIES[int(str(token.lastgroup)[1:])][1]
        elif token["id"] in known:
            out += re.escape(known[token["id"]])
        elif token["id"] in new:
            out += f"(?P=id{new.index(token['id'])})"
        else:
            out += f"(?P<id{len(new)}>{UUID})"
            new.append(token["id"])
    return re.compile(out + re.escape(shown[at:])), new


@pytest.fixture(scope="module")
def one_worker(redis_server: RunningRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestStack]:
    home = tmp_path_factory.mktemp("operating")
    url = fresh_database(redis_server)
    environ = child_environment(url, home) | {"MODM_WORKER__MODE": "pooled", "MODM_EMBEDDER": "fake"}
    with processes(home / "logs", environ) as group:
        yield start_stack(load_settings(redis_url=url, home=home), environ, group, workers=1, controller=True)


def settle(stack: TestStack, words: list[str]) -> None:
    """Wait for what a command sets going: the next one of the page comes seconds later."""
    if words[0] == "submit" and "--no-wait" not in words:
        newest = stack.get("/v1/requests?limit=1")[0]["id"]
        assert stack.get(f"/v1/requests/{newest}?wait_s=9&admitted=true")["admitted_s"], "the image is in the cache"
    if words[:2] == ["workers", "drain"]:
        wait_until(lambda: stack.get("/v1/workers")[0]["in_force"] is None, 20, "the drain to be in force")
    if words[:2] == ["workers", "resume"]:
        wait_until(lambda: stack.get("/v1/workers")[0]["in_force"] == "large", 20, "the worker to be back")


def test_every_example_prints_what_the_page_says(one_worker: TestStack, tmp_path: Path) -> None:
    known: dict[str, str] = {}
    host = f"gpu0@{socket.gethostname()}"
    ran = 0
    page = PAGE.read_text("utf-8")
    for name, text in FILE.findall(page):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for block in BLOCK.findall(page):
        for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, shown = example.split("\n", 1)
            ran += 1
            for page_id, real_id in known.items():
                command = command.replace(page_id, real_id)
            words = shlex.split(command.replace(HOST, host))
            env = dict(one_worker.environ)
            while "=" in words[0]:
                name, _, value = words.pop(0).partition("=")
                env |= {name: value, "MODM_API__PORT": "0"}  # doctor would find the test's own port in use
            assert words.pop(0) == "modm"
            done = run_modm(*words, env=env, cwd=tmp_path)
            printed = re.sub(r"[ \t]+$", "", (done.stderr + done.stdout).replace(host, HOST), flags=re.MULTILINE)
            fits, new = pattern(shown, known)
            found = fits.fullmatch(printed) or (shown.endswith("...\n") and fits.match(printed))
            assert found, f"$ {command}\n{printed}\nbut the page has\n{shown}"
            settle(one_worker, words)
            known |= {page_id: found[f"id{i}"] for i, page_id in enumerate(new)}
    assert ran > 10


def test_the_live_view_draws_anew_until_it_is_interrupted(one_worker: TestStack) -> None:
    """On a terminal, as a user has it: the uptime moves on, and Ctrl-C ends with 130."""
    terminal, inner = pty.openpty()
    watch = subprocess.Popen(
        [*MODM, "status", "--watch"], env=one_worker.environ, stdin=inner, stdout=inner, stderr=inner
    )
    os.close(inner)
    text, until = "", time.monotonic() + 30
    try:
        while len(set(re.findall(r"up (\d+) s, ready", text))) < 2:
            assert time.monotonic() < until, text
            if select.select([terminal], [], [], 1)[0]:
                text += os.read(terminal, 65536).decode("utf-8", "replace")
        watch.send_signal(signal.SIGINT)
        assert watch.wait(10) == 130
        assert "gpu0@" in text
        assert "Traceback" not in text
    finally:
        watch.kill()
        watch.wait()
        os.close(terminal)
