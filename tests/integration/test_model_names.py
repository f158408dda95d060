"""A run that names its models: aliases match, others are refused before anything is sent."""

from __future__ import annotations

import json
from pathlib import Path

from modm_tasks.settings import load_settings
from ops.redis_server import RunningRedis
from tests.conftest import child_environment, fresh_database
from tests.support.processes import processes, run_modm, wait_until
from tests.support.stack import start_stack


def test_aliases_match_and_another_pair_is_one_line_and_exit_2(redis_server: RunningRedis, tmp_path: Path) -> None:
    url, home = fresh_database(redis_server), tmp_path / "home"
    home.mkdir()
    env = child_environment(url, home) | {"MODM_WORKER__MODE": "pooled", "MODM_EMBEDDER": "fake"}
    env |= {"MODM_LARGE_MODEL": "sd3.5", "MODM_SMALL_MODEL": "sdxl"}
    trace = tmp_path / "trace.txt"
    trace.write_text("a red fox\na blue fox\n")
    with processes(home / "logs", env) as group:
        stack = start_stack(load_settings(redis_url=url, home=home), env, group)
        client_env = {k: v for k, v in stack.environ.items() if not k.startswith(("MODM_LARGE", "MODM_SMALL"))}

        for command in ("submit-trace", "bench throughput --trace"):
            refused = run_modm(*command.split(), str(trace), "--large-model", "flux", env=client_env)
            assert refused.returncode == 2, refused.stderr
            (line,) = [text for text in refused.stderr.splitlines() if text.startswith("error:")]
            assert "Traceback" not in refused.stderr
            assert "serve stable-diffusion-3.5-large as the large model, not FLUX.1-dev" in line
        assert stack.get("/v1/status")["window"].get("arrivals", 0) == 0

        pair = ["--large-model", "SD3.5", "--small-model", "stable-diffusion-xl-base-1.0"]
        ran = run_modm("submit-trace", str(trace), *pair, "--json", env=client_env)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["requests"]["done"] == 2

        # Times that were learned are read again after two seconds.
        status = wait_until(
            lambda: (s := stack.get("/v1/status"))["slo"]["large_latency_s"] > 0 and s, 20, "times per step"
        )
        assert status["models"] == {"large": "stable-diffusion-3.5-large", "small": "stable-diffusion-xl-base-1.0"}
        assert {w["large_model"] for w in status["workers"]} == {"stable-diffusion-3.5-large"}
