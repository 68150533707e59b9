"""The request that every peer answers, and how a peer talks to `run.py`: a line in, a line of JSON out.

A peer is a process of its own, in an environment of its own if it needs one: whatever it loads, starts or caches is its own business. It
prints one line when it is ready, one per request, and one when it is told to stop.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TEXT_BEFORE, TEXT_AFTER = 35, 29
"""Text tokens around the picture, as many as LLaVA-1.5's grounding prompt has."""
IMAGE_TOKEN, FIRST_ID, LAST_ID = 32000, 3, 31999


@dataclass(frozen=True)
class Request:
    """One picture and one prompt, the same in every run.

    Attributes:
        pixels: [1, 3, 336, 336] float32, noise.
        input_ids: [T] int64 with one placeholder.
    """

    pixels: Any
    input_ids: Any

    def expanded_ids(self, visual_tokens: int) -> Any:
        """[1, T - 1 + N] int64 with the placeholder as often as there are visual tokens."""
        before, after = self.input_ids[:TEXT_BEFORE], self.input_ids[TEXT_BEFORE + 1 :]
        return np.r_[before, [IMAGE_TOKEN] * visual_tokens, after][None].astype(np.int64)


def request() -> Request:
    """The request."""
    random = np.random.default_rng(1)
    pixels = random.standard_normal((1, 3, 336, 336), np.float32)
    ids = random.integers(FIRST_ID, LAST_ID, TEXT_BEFORE + 1 + TEXT_AFTER)
    ids[TEXT_BEFORE] = IMAGE_TOKEN
    return Request(pixels, ids)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def serve(facts: dict[str, Any], answer: Callable[[], tuple[float, list[float], list[int]]]) -> None:
    """Answer for as long as lines come.

    Args:
        facts: of getting ready: versions, seconds, bytes.
        answer: one request -> (seconds to the first token, seconds of every further token, tokens).
    """
    print(json.dumps({"ready": True, "peak_rss_bytes": peak_rss_bytes(), **facts}), flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        first, later, tokens = answer()
        row = {
            "ttft_ms": 1e3 * first,
            "tpot_ms": 1e3 * sum(later) / len(later),
            "tokens": tokens,
            "steps_ms": [1e3 * step for step in later],
        }
        print(json.dumps(row), flush=True)
    print(json.dumps({"stopped": True, "peak_rss_bytes": peak_rss_bytes()}), flush=True)


def now() -> float:
    """Seconds."""
    return time.perf_counter()
