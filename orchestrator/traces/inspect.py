"""What a trace looks like: counts, rate, repetition, and the best earlier similarity of each prompt."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.report.plots import COLOURS, figure
from orchestrator.traces.rows import LoadedTrace, TraceRow, TraceStream

BLOCK = 512
BARS = (0.95, 0.90, 0.80)


def best_earlier(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """For each row the best cosine to any earlier row, and which (the latest among equals): [n], [n]. Row 0 has -1.

    In blocks, so that memory stays at BLOCK x n numbers.
    """
    n = len(vectors)
    best = np.full(n, -1.0, dtype=np.float32)
    where = np.full(n, -1, dtype=np.int64)
    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        scores = vectors[low:high] @ vectors[:high].T
        for row in range(max(low, 1), high):
            earlier = scores[row - low, :row]
            latest = row - 1 - int(np.argmax(earlier[::-1]))
            best[row], where[row] = earlier[latest], latest
    return best, where


class Summary:
    """What is kept of a trace that is read once, row by row: 8 bytes for a time, a hash for each distinct prompt.

    Two prompts of 14 million share a 64-bit hash once in 200,000 traces.
    """

    def __init__(self, trace: LoadedTrace | TraceStream) -> None:
        self.times = array("d")
        self._requests = self._repeats = self._characters = 0
        prompts: set[int] = set()
        clients: set[int] = set()
        for row in trace.rows if isinstance(trace, LoadedTrace) else trace:
            self._requests += 1
            self._characters += len(row.prompt)
            key = hash(row.prompt)
            self._repeats += key in prompts
            prompts.add(key)
            clients.add(hash(row.client))
            if row.arrival_s is not None:
                self.times.append(row.arrival_s)
        self._clients = len(clients)
        self._format, self._left_out, self._defaulted = trace.format, len(trace.skipped), dict(trace.defaulted)

    def figures(self) -> dict[str, Any]:
        """Plain numbers by name."""
        figures: dict[str, Any] = {
            "format": self._format,
            "requests": self._requests,
            "malformed rows left out": self._left_out,
            "clients": self._clients,
            "mean prompt length, characters": round(self._characters / self._requests, 1),
            "exact repeats": round(self._repeats / self._requests, 4),
        }
        figures |= {f"defaulted {name}": n for name, n in self._defaulted.items()}
        if len(self.times) > 1:
            times = np.asarray(self.times)
            span_min = float(times.max() - times.min()) / 60
            figures["minutes"] = round(span_min, 1)
            figures["mean rate per minute"] = round(len(times) / span_min, 2) if span_min else None
            minutes = np.bincount(((times - times.min()) // 60).astype(np.int64))
            figures["peak rate per minute"] = int(minutes.max())
        return figures


def similarity_figures(vectors: NDArray[np.float32]) -> dict[str, Any]:
    """Shares above some cosines, and how far back the nearest similar earlier prompt is."""
    best, where = best_earlier(vectors)
    figures: dict[str, Any] = {
        f"best earlier cosine >= {bar:.2f}": round(float((best >= bar).mean()), 4) for bar in BARS
    }
    similar = np.nonzero(best >= 0.80)[0]
    if len(similar):
        back = similar - where[similar]
        p10, p50, p90 = np.percentile(back, [10, 50, 90])
        figures["requests back, p10 / p50 / p90"] = f"{p10:.0f} / {p50:.0f} / {p90:.0f}"
    recent = sum(1 for i in range(1, len(vectors)) if float((vectors[max(0, i - 50) : i] @ vectors[i]).max()) >= 0.80)
    figures["cosine >= 0.80 in the last 50"] = round(recent / len(vectors), 4)
    return figures


def rate_plot(times_s: Sequence[float]) -> bytes:
    """PNG: requests per minute over time; next to nothing where the trace has no times."""
    times = np.asarray(times_s if len(times_s) else [0.0]) / 60

    def draw(axes: Any) -> None:
        bins = max(1, min(200, int(times.max() - times.min()) + 1))
        counts, edges = np.histogram(times, bins=bins)
        width = edges[1] - edges[0]
        axes.stairs(counts / width if width > 0 else counts, edges, fill=True, color=COLOURS[0])
        axes.set(xlabel="minutes", ylabel="requests per minute")

    return figure(draw)


def write_jsonl(rows: Iterable[TraceRow], path: Path) -> int:
    """Own format, written aside and renamed; returns how many rows. ``rows`` may be a stream: nothing is held."""
    aside = path.with_name(f".{path.name}.part")
    written = 0
    try:
        with aside.open("w", encoding="utf-8") as file:
            for row in rows:
                fields = {
                    "prompt": row.prompt, "arrival_s": row.arrival_s, "seed": row.seed, "size": row.size,
                    "client": row.client or None, "num_inference_steps": row.num_inference_steps,
                    "deadline_s": row.deadline_s,
                }  # fmt: skip
                file.write(json.dumps({k: v for k, v in fields.items() if v is not None}, ensure_ascii=False) + "\n")
                written += 1
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return written
