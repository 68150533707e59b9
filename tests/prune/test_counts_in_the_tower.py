"""Every strategy inside a vision tower with the count as an input of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from gap_export import prune
from gap_export.bundle.manifest import Pruning
from gap_export.positions import Ids
from tests.exported import ExportedGraph

pytestmark = pytest.mark.slow

TOTAL = 36
NAMES = [row.name for row in prune.PRUNERS.values() if not row.in_decoder and row.name != "none"]


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_takes_the_count_as_an_input(
    name: str,
    vision_graph: Callable[..., ExportedGraph],
    tiny_reference: Callable[[Pruning], Any],
    pixels: NDArray[np.float32],
    text_ids: Ids,
) -> None:
    """From the fewest to all, the tokens and embeddings that transformers' tower and the float64 reference give for that count."""
    row = prune.row(name)
    vision = vision_graph(pruner=name, keep=f"{row.min_tokens / TOTAL}:1.0")
    session = ort.InferenceSession(str(vision.path))
    feeds = {"pixel_values": pixels, **({"text_ids": text_ids} if row.needs_text else {})}
    for count in (row.min_tokens, 12, TOTAL):
        embeds, kept = session.run(None, {**feeds, "keep_count": np.array(count)})
        pruning = Pruning(
            pruner=name, keep=count / TOTAL, kept=count, positions="gap", seed=0, merged=row.merged
        )
        expected = tiny_reference(pruning).encode({"pixel_values": pixels}, text_ids_BL=feeds.get("text_ids"))
        assert kept.tolist() == expected.kept_indices.tolist()
        scale = float(expected.embeds.abs().max())
        np.testing.assert_allclose(embeds, expected.embeds.numpy(), rtol=0, atol=2e-5 * scale)
