"""Many requests in one process: memory stays where it is, and answers stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import gap_export as gap
from gap_export.bundle.folder import Bundle

pytestmark = pytest.mark.long

REQUESTS, WARMUP = 3000, 300
GROWTH_BYTES = 48 * 2**20
"""What allocators may keep; a cache of the tiny model that is lost per request would be ten times as much."""


@pytest.mark.parametrize("changes", [{}, {"keep": "0.1:0.25:1.0"}], ids=["fixed", "dynamic"])
def test_memory_stays_flat_and_answers_stay_the_same(
    tiny_bundle: Callable[..., Bundle], changes: dict[str, str]
) -> None:
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((40, 48), (48, 40), (200, 31), (36, 36))
    ]
    expressions = ["the red mug", "cat on left of the small blue circle", "square"]
    process = psutil.Process()
    with gap.load(tiny_bundle(**changes), threads=1) as model:
        first: dict[tuple[int, int], str] = {}
        settled = 0
        for request in range(REQUESTS):
            place = request % len(images), request % len(expressions)
            answer = model.ground(images[place[0]], expressions[place[1]])
            assert first.setdefault(place, answer.text) == answer.text
            if request == WARMUP:
                settled = process.memory_info().rss
        assert process.memory_info().rss - settled < GROWTH_BYTES


def test_sessions_that_are_closed_give_their_memory_back(
    tiny_bundle: Callable[..., Bundle], image_file: Path
) -> None:
    bundle, process = tiny_bundle(), psutil.Process()
    settled = 0
    for opened in range(60):
        with gap.load(bundle, threads=1) as model:
            model.ground(image_file, "the red mug")
        if opened == 10:
            settled = process.memory_info().rss
    assert process.memory_info().rss - settled < GROWTH_BYTES
