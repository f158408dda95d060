"""A single submit: the way round the framework and the application's own route give the same answers to the same calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from modm_tasks.messages import MAX_PROMPT_CHARS
from orchestrator.auth import Gate, KeyFile, keys_path
from orchestrator.compose import make_app
from orchestrator.submit import MAX_BODY_BYTES, PATH, SubmitFirst
from tests.conftest import SettingsFactory

JSON = {"content-type": "application/json"}
LONG_NAME = "s" * 200


class Doors:
    """Both ways to one service."""

    def __init__(self, first: TestClient, app: TestClient, keys: KeyFile) -> None:
        self.both, self.first, self.keys = (first, app), first, keys

    def post(self, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        """The answer, which is the same at both."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answers = [door.post(PATH, content=content, headers=JSON | (headers or {})) for door in self.both]
        one, other = [(a.status_code, a.json()) for a in answers]
        if one[0] != 202:
            assert one == other
            assert answers[0].headers["x-should-retry"] == answers[1].headers["x-should-retry"]
        return one


@pytest.fixture
def doors(settings: SettingsFactory) -> Iterator[Doors]:
    made = settings(embedder="fake")
    keys = KeyFile(keys_path(made))
    gate = Gate(keys)
    app = make_app(made, gate)
    with TestClient(app) as whole:
        yield Doors(TestClient(SubmitFirst(app, gate)), whole, keys)


def test_what_is_accepted_can_be_read_through_either(doors: Doors) -> None:
    for door, other in (doors.both, doors.both[::-1]):
        answer = door.post(
            PATH, json={"prompt": "a lake", "seed": 5}, headers={"content-type": "application/json; charset=utf-8"}
        )
        assert answer.status_code == 202
        record = answer.json()
        read = other.get(f"{PATH}/{record['id']}").json()
        assert read["request"] == record["request"]
        assert (record["state"], record["request"]["prompt"], record["request"]["seed"]) == ("accepted", "a lake", 5)
    assert doors.first.get("/healthz").json()["status"] == "ok"
    assert doors.first.get(PATH).json()  # the list: another method goes to the application


def test_a_repeated_key_is_the_same_request_through_either(doors: Doors) -> None:
    ids = {
        door.post(PATH, json={"prompt": "a lake"}, headers={"Idempotency-Key": "k1"}).json()["id"]
        for door in doors.both
    }
    assert len(ids) == 1
    assert doors.post({"prompt": "a lake"}, {"Idempotency-Key": "k" * 201})[1]["error"]["field"] == "Idempotency-Key"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": "x" * (MAX_PROMPT_CHARS + 1)}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "size": "63x64"}, "size"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "num_inference_steps": 900}, "num_inference_steps"),
        ({"prompt": "a", LONG_NAME: 1}, LONG_NAME[:120]),
        ({"prompt": "a", "two\nlines": 1}, "two\\nlines"),
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b'{"prompt": "\\ud800"}', None),
    ],
)
def test_bad_input_names_the_field_and_does_not_echo(doors: Doors, body: Any, field: str | None) -> None:
    status, answer = doors.post(body)
    error = answer["error"]
    assert (status, error["code"], error["field"]) == (422, "invalid_input", field)
    assert len(error["message"].splitlines()) == 1
    assert len(error["message"]) < 300


def test_only_json_of_a_bounded_length_is_read(doors: Doors) -> None:
    """Text and forms are what any web page may send to a loopback service unasked."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""):
        status, answer = doors.post({"prompt": "a"}, {"content-type": kind})
        assert (status, answer["error"]["field"]) == (422, "Content-Type"), kind
    status, answer = doors.post({"prompt": "a", "negative_prompt": "x" * MAX_BODY_BYTES})
    assert (status, answer["error"]["message"]) == (422, f"body: the limit is {MAX_BODY_BYTES} bytes")
    chunks = (b" " * 1024 for _ in range(300))
    assert doors.first.post(PATH, content=chunks, headers=JSON).status_code == 422


def test_a_key_is_needed_where_there_are_keys_and_says_who_submits(doors: Doors) -> None:
    secret = doors.keys.add("studio", ["submit"], requests_per_min=2)
    reader = doors.keys.add("viewer", ["read"])
    for headers in ({}, {"authorization": "Bearer modm_wrong"}, {"authorization": f"Bearer {reader}"}):
        assert doors.post({"prompt": "a"}, headers)[0] == 401
    status, record = doors.post({"prompt": "a", "client": "somebody else"}, {"authorization": f"Bearer {secret}"})
    assert (status, record["request"]["client"]) == (202, "studio")
    answers = [
        door.post(PATH, json={"prompt": "a"}, headers={"authorization": f"Bearer {secret}"}) for door in doors.both
    ]
    assert [a.status_code for a in answers] == [429, 429]
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers)


def test_the_document_says_what_a_submit_takes(doors: Doors) -> None:
    call = doors.first.get("/openapi.json").json()["paths"][PATH]["post"]
    assert call["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/SubmitRequest")
    assert {p["name"] for p in call["parameters"]} == {"idempotency-key", "authorization"}
