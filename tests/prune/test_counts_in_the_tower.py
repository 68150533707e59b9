"""Every strategy inside a vision tower with the count as an input of the graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from gap_export import prune
from gap_export.positions import Ids
from tests.exported import ExportedGraph

pytestmark = pytest.mark.slow

TOTAL = 36
NAMES = [row.name for row in prune.PRUNERS.values() if not row.in_decoder and row.name != "none"]


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_takes_the_count_as_an_input(
    name: str, vision_graph: Callable[..., ExportedGraph], pixels: NDArray[np.float32], text_ids: Ids
) -> None:
    """The same tokens and embeddings as a graph with that count built in, from the fewest to all."""
    row = prune.row(name)
    session = ort.InferenceSession(str(vision_graph(pruner=name, keep=f"{row.min_tokens / TOTAL}:1.0").path))
    feeds = {"pixel_values": pixels, **({"text_ids": text_ids} if row.needs_text else {})}
    for count in (row.min_tokens, 12, TOTAL):
        embeds, kept = session.run(None, {**feeds, "keep_count": np.array(count)})
        fixed = vision_graph(pruner=name, keep=count / TOTAL).path
        embeds_there, kept_there = ort.InferenceSession(str(fixed)).run(None, feeds)
        assert kept.tolist() == kept_there.tolist()
        np.testing.assert_allclose(embeds, embeds_there, rtol=0, atol=2e-5 * np.abs(embeds_there).max())
