"""Every entrance of the HTTP API under cases drawn from its own OpenAPI document: never a 500, always one error shape.

Seeded and small here; MODM_TEST_FUZZ_CASES=10000 runs the long form. Calls that end or empty the shared stack are left
out, and so are those that hold the answer open by design.
"""

from __future__ import annotations

import json
import os
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from modm_tasks.messages import new_request_id
from tests.support.stack import TestStack

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("MODM_TEST_FUZZ_CASES", "500"))
#: Held open until a request ends, or draws synchronously.
SLOW = {("GET", "/v1/requests/{request_id}/events"), ("POST", "/v1/images/generations")}


def check(answer: httpx.Response, what: str) -> None:
    """A success, or a refusal in our one shape."""
    assert answer.status_code < 500 or answer.status_code == 503, f"{what}: {answer.status_code} {answer.text[:300]}"
    if answer.is_success or answer.status_code in {404, 405}:  # an unknown path or method is the framework's to refuse
        return
    error = answer.json()["error"]
    assert error["code"], what
    assert error["message"], what
    assert "Traceback" not in error["message"], what
    assert len(error["message"].splitlines()) == 1, what


def test_no_call_of_the_openapi_document_breaks_the_service(module_stack: TestStack) -> None:
    with httpx.Client(base_url=module_stack.url, timeout=30, trust_env=False) as http:
        document = http.get("/openapi.json").json()
        schema = schemathesis.openapi.from_dict(document)
        operations = [o.ok() for o in schema.get_all_operations()]
        chosen = [o for o in operations if (o.method.upper(), o.path) not in SLOW]
        assert len(chosen) > 12
        each = max(5, CASES // (2 * len(chosen)))

        for operation in chosen:
            name = f"{operation.method.upper()} {operation.path}"
            for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
                strategy = operation.as_strategy(generation_mode=mode)

                @seed(8)
                @settings(
                    max_examples=each, deadline=None, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )  # fmt: skip
                @given(case=strategy)
                def run(case: Any, name: str = name) -> None:
                    if "wait_s" in (case.query or {}):
                        case.query["wait_s"] = 0
                    kwargs = case.as_transport_kwargs(base_url=module_stack.url)
                    kwargs.pop("cookies", None)
                    check(http.request(**kwargs), name)

                run()
        assert http.get("/healthz").is_success
