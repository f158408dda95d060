"""How many cases each fuzzed entrance gets: 500 in all in the test command, MODM_TEST_FUZZ_CASES=10000 in the long form."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

TOTAL = int(os.environ.get("MODM_TEST_FUZZ_CASES", "500"))
#: Share of each entrance. The HTTP API has most fields.
SHARES = {"api": 0.5, "settings": 0.14, "catalogue": 0.14, "traces": 0.14, "import": 0.08}

#: What people, scripts and broken tools write where something else belongs.
ODD_TEXT = st.sampled_from(
    [
        *("", " ", "0", "-1", "1e999", "nan", "inf", "-0.0", "9" * 40, "null", "true", "{}", "[]", '{"a": 1}', "[[[["),
        *(
            "../../etc/passwd",
            "/dev/null",
            "~",
            "a\nb",
            "a\tb",
            "é",
            "\u202e",
            "\U0001f600",
            "%s%n",
            "${HOME}",
            "x" * 5000,
        ),
        *("http://", "redis://:::", "s3://", "64x64", "0x0", "99999x99999", "<script>", "'; DROP", "a=b=c", "\\"),
    ]
)
TEXT = ODD_TEXT | st.text(max_size=30)
NUMBER = st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63), 10**40, 0.0, -0.5, 1e308]) | st.integers() | st.floats()
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def seeded(entrance: str, *, parts: int = 1) -> Callable[[Any], Any]:
    """The settings of a fuzz test of ``entrance``, one of ``parts``: the same cases at every run, none shrunk."""
    return settings(
        max_examples=max(5, int(TOTAL * SHARES[entrance] / parts)),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
