"""Every entrance of the HTTP API under cases drawn from its own OpenAPI document: never a 500, always one error shape.

Seeded and small here; MODM_TEST_FUZZ_CASES=10000 runs the long form (tests/support/fuzz.py). Calls that end or empty
the shared stack are left out, and so are those that hold the answer open by design.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from tests.support.fuzz import SHARES, TOTAL
from tests.support.stack import TestStack

pytestmark = pytest.mark.slow

CASES = int(TOTAL * SHARES["api"])
#: Held open until a request ends, or draws synchronously (what is refused is not drawn).
SLOW = {
    *(("GET", "/v1/requests/{request_id}/events", mode) for mode in schemathesis.GenerationMode),
    ("POST", "/v1/images/generations", schemathesis.GenerationMode.POSITIVE),
}


def check(answer: httpx.Response, what: str) -> None:
    """A success, or a refusal in our one shape."""
    assert answer.status_code < 500 or answer.status_code == 503, f"{what}: {answer.status_code} {answer.text[:300]}"
    if answer.is_success or answer.status_code in {404, 405}:  # an unknown path or method is the framework's to refuse
        return
    error = answer.json().get("error")
    assert error, f"{what}: {answer.status_code} {answer.text[:300]}"
    assert error["code"], what
    assert len(error["message"].splitlines()) == 1, what
    assert "Traceback" not in error["message"], what


def fuzz(operation: Any, mode: Any, http: httpx.Client, examples: int) -> None:
    """Send ``examples`` cases of one operation, valid or invalid ones, from a fixed seed."""
    name = f"{operation.method.upper()} {operation.path}"

    @seed(8)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if "wait_s" in (case.query or {}):
            case.query["wait_s"] = 0
        kwargs = case.as_transport_kwargs(base_url=str(http.base_url))
        kwargs.pop("cookies", None)
        if isinstance(kwargs.get("data"), bytes | str):
            kwargs["content"] = kwargs.pop("data")
        try:
            answer = http.request(**kwargs)
        except (UnicodeEncodeError, httpx.InvalidURL, AttributeError, TypeError):  # cannot be put on the wire at all
            return
        except httpx.TransportError as error:
            raise AssertionError(f"{name}: no answer to {kwargs}: {error!r}") from error
        check(answer, name)

    try:
        run()
    except Unsatisfiable:  # a call without parameters has no invalid form
        assert mode is schemathesis.GenerationMode.NEGATIVE, name


def test_no_call_of_the_openapi_document_breaks_the_service(module_stack: TestStack) -> None:
    with httpx.Client(base_url=module_stack.url, timeout=30, trust_env=False) as http:
        schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
        operations = [o.ok() for o in schema.get_all_operations()]
        good, bad = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
        chosen = [(o, mode) for o in operations for mode in (good, bad) if (o.method.upper(), o.path, mode) not in SLOW]
        assert len(chosen) > 24
        for operation, mode in chosen:
            fuzz(operation, mode, http, max(3, CASES // len(chosen)))
        assert http.get("/healthz").is_success
