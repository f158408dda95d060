"""`modm bench` on a running stack: what each experiment sets, what it leaves behind, what it writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from modm_tasks.ledger import Ledger
from orchestrator.controller.pooling import MARK
from orchestrator.stack_profile import ROWS
from tests.conftest import SettingsFactory
from tests.support.processes import Processes, run_modm, wait_until
from tests.support.stack import start_stack

SUBJECTS = ("a red boat", "a blue house", "a green tree")


def test_experiments_set_the_control_and_give_it_back(
    settings: SettingsFactory, environ: dict[str, str], procs: Processes, tmp_path: Path
) -> None:
    fast = {"MODM_EMBEDDER": "fake", "MODM_WORKER__FAKE_LARGE_S": "0.1", "MODM_WORKER__FAKE_SMALL_S": "0.02"}
    control = {"MODM_CONTROLLER__PERIOD_S": "1", "MODM_CONTROLLER__WINDOW_S": "5", "MODM_CONTROLLER__BUCKET_S": "0.5"}
    stack = start_stack(settings(), environ | fast | control, procs, controller=True)
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"prompt": SUBJECTS[i % 3]}) + "\n" for i in range(30)))
    stack.client.put("/v1/control", json={"cache_admission": "all", "static_large": 2})
    ledger = Ledger.from_settings(stack.settings)

    def pooled_by_itself() -> bool:
        return bool(ledger.document(MARK)) and stack.client.get("/v1/control")["mode"] == "pooled"

    wait_until(pooled_by_itself, 20, "slo to pool the roles")
    before = stack.client.get("/v1/control")

    call = ("bench", "throughput", "--trace", str(trace), "--num-requests", "18", "--warm-up", "3", "--json")
    done = run_modm(*call, "--report", str(tmp_path / "burst"), env=stack.environ)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["throughput"]
    assert report["requests"]["done"] == 18
    assert report["settings"]["cache_admission"] == "large-only"
    assert report["hit_rate"] > 0
    spaces = stack.get("/v1/cache/stats")["namespaces"]
    (name,) = (n for n in spaces if n.startswith("bench-throughput-"))
    misses = report["skipped_steps"].get("0", 0)
    assert spaces[name]["images"] == 3 + misses  # the refined images stayed outside

    longer, pictures, profile = tmp_path / "longer.jsonl", tmp_path / "pictures", tmp_path / "fake.toml"
    longer.write_text("".join(json.dumps({"prompt": SUBJECTS[i % 3]}) + "\n" for i in range(ROWS + 20)))
    pictures.mkdir()
    Image.new("RGB", (64, 64), "red").save(pictures / "boat.png")
    (pictures / "boat.txt").write_text(SUBJECTS[0])
    profile.write_text("[models.scenes-large]\nimage_s = 0.1\n[models.scenes-small]\nimage_s = 0.02\n")
    call = ("bench", "validate", "--trace", str(longer), "--profile", str(profile), "--arrivals", "closed", "--json")
    given = ("--num-requests", "20", "--cache-directory", str(pictures), "--report", str(tmp_path / "validate"))
    done = run_modm(*call, *given, env=stack.environ)
    assert done.returncode in {0, 4}, done.stderr  # the times of a profile by hand are no measurement
    found = json.loads(done.stdout)
    assert found["requests"] == 20
    # Two of the three prompts are new, so at most 18 of 20 hit. Images take a tenth of a second, and on a busy host they
    # enter the cache later than the simulator knows: the real rate may be lower, but not higher by more than two of twenty.
    assert found["real"]["hit_rate"] > 0.4
    assert found["real"]["hit_rate"] - 0.11 <= found["simulated"]["hit_rate"] <= 0.9
    with np.load(tmp_path / "validate" / "run" / "vectors.npz") as vectors:
        assert (len(vectors["text"]), len(vectors["image"]), len(vectors["warm"])) == (20, 20, 1)

    roles = ("bench", "rising", "--trace", str(trace), "--rate-per-min", "3000", "--workers", "roles", "--json")
    done = run_modm(*roles, "--report", str(tmp_path / "rising"), env=stack.environ)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["rising"]
    assert report["requests"]["done"] == 30
    assert report["settings"]["mode"] == "roles"
    assert report["roles"]["looks"] > 0
    assert report["roles"]["active_queues_disagreed"] == 0
    with (tmp_path / "rising" / "witness.csv").open(newline="") as lines:
        assert {row["active_queues"] for row in csv.DictReader(lines) if row["settled"] == "True"} <= {
            "large-gen small-refine", "small-refine",
        }  # fmt: skip
    assert (tmp_path / "rising" / "controller.csv").read_text().startswith("at_s,why,n_large")
    wait_until(pooled_by_itself, 10, "the controller to pool again: what it chose is not an operator's word")
    assert stack.client.get("/v1/control") == before
    ledger.redis.close()
