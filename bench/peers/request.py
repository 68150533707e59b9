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
"""Text tokens around the image, as many as LLaVA-1.5's grounding prompt has."""
FIRST_ID, SMALL_VOCABULARY = 3, 1000


@dataclass(frozen=True)
class Request:
    """One image and one prompt, the same in every run.

    Attributes:
        pixels: [1, 3, size, size] float32, noise.
        input_ids: [T] int64 with one placeholder.
        image_token: its id.
        visual_tokens: N.
        layers: of the decoder.
        kv_heads: of the decoder.
        head_dim: of the decoder.
    """

    pixels: Any
    input_ids: Any
    image_token: int
    visual_tokens: int
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def expanded_ids(self) -> Any:
        """[1, T - 1 + N] int64 with the placeholder as often as there are visual tokens."""
        (at,) = np.flatnonzero(self.input_ids == self.image_token)
        before, after = self.input_ids[:at], self.input_ids[at + 1 :]
        return np.r_[before, [self.image_token] * self.visual_tokens, after][None].astype(np.int64)


def request(checkpoint: str) -> Request:
    """The request that fits a checkpoint: 65 text tokens, or 21 for the bundled model, whose prompts are shorter."""
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    vision, text, image_token = config["vision_config"], config["text_config"], config["image_token_index"]
    random = np.random.default_rng(1)
    pixels = random.standard_normal((1, 3, vision["image_size"], vision["image_size"]), np.float32)
    small = text["vocab_size"] < SMALL_VOCABULARY
    before, after = (10, 10) if small else (TEXT_BEFORE, TEXT_AFTER)
    # Below the special tokens that were added at the end, or above those at the beginning.
    ids = random.integers(
        *((image_token + 1, text["vocab_size"]) if small else (FIRST_ID, image_token)), before + 1 + after
    )
    ids[before] = image_token
    heads = text["num_attention_heads"]
    return Request(
        pixels,
        ids,
        image_token,
        (vision["image_size"] // vision["patch_size"]) ** 2,
        text["num_hidden_layers"],
        text.get("num_key_value_heads", heads),
        text.get("head_dim") or text["hidden_size"] // heads,
    )


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def export_facts(began: float, folder: Path) -> dict[str, Any]:
    """Of an export that has just ended: its seconds, the peak of memory so far, what lies in its folder."""
    return {
        "export_s": now() - began,
        "export_peak_rss_bytes": peak_rss_bytes(),
        "written_bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


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
