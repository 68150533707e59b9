"""Families whose images become tiles, from a small checkpoint to answers: ONNX Runtime against transformers' own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.runtime.torch.staged import open_reference
from tests.families.answers import Families, answer, assert_equal
from tests.families.contract import Contract
from tests.families.tiny_families import TILES, ranged

pytestmark = pytest.mark.slow


class TestTiles(Contract):
    families = TILES

    @pytest.mark.parametrize("name", ["llava_next", "internvl"])
    def test_every_tile_keeps_the_same_share(self, tiny_family: Families, name: str) -> None:
        """Over the whole image shares differ: the control for what a tile by itself must keep."""
        shares = {}
        for options in ({"pruner": "tile_attention", "keep": 0.3}, ranged("cls_attention")):
            asked = tiny_family(name).asked(**options)
            kept = asked.answer(2).kept_indices
            shares[options["pruner"]] = [
                share
                for row, call in enumerate(asked.batch(2).calls)
                for share in shares_of_tiles(call, kept[row])
            ]
        assert max(abs(share - 0.3) * size for share, size in shares["tile_attention"]) < 1
        assert max(abs(share - 0.3) * size for share, size in shares["cls_attention"]) > 2

    @pytest.mark.parametrize(
        ("name", "pruner"), [("llava_next", "cls_attention"), ("llava_onevision", "divprune")]
    )
    @pytest.mark.parametrize("keep", [0.1, 0.3])
    def test_ends_of_lines_are_never_pruned(
        self, tiny_family: Families, name: str, pruner: str, keep: float
    ) -> None:
        asked = tiny_family(name).asked(**ranged(pruner))
        kept = asked.answer(2, keep).kept_indices
        for row, call in enumerate(asked.batch(2).calls):
            lines = call["newline_positions"]
            assert set(lines) <= set(kept[row])
            assert 0 < len(lines) < (kept[row] >= 0).sum()

    def test_a_line_that_ends_elsewhere_shows(self, tiny_family: Families) -> None:
        """The place of an end of a line is an id like any other: the model must see when it is wrong."""
        asked = tiny_family("llava_next").asked(**ranged("cls_attention"))
        assert asked.changed(newline_positions=lambda places: np.sort(np.r_[places[:-1], 3])) > 1e-2

    def test_the_expression_is_read_once_for_all_tiles(
        self, tiny_family: Families, tiny_text_tower: Path, text_ids: Any
    ) -> None:
        from gap_export.runtime.torch.text_reference import TextReference

        asked = tiny_family("llava_next").asked(
            pruner="text_similarity", keep=0.3, text_tower=str(tiny_text_tower)
        )
        bundle = asked.bundle
        assert bundle.manifest.text_tower is not None
        reads = TextReference(tiny_text_tower, bundle.manifest.text_tower)
        reference = open_reference("llava_next", asked.folder, bundle.manifest.pruning, text_tower=reads)
        mine, theirs, other = (
            answer(session, bundle, asked.batch(2), text_ids_BL=ids)
            for session, ids in (
                (asked.session, text_ids[:2]),
                (reference, text_ids[:2]),
                (reference, text_ids[2:4]),
            )
        )
        assert_equal(mine, theirs)
        assert not np.array_equal(mine.kept_indices, other.kept_indices)


def shares_of_tiles(call: Any, kept: Any) -> list[tuple[float, int]]:
    """(share kept, how many tokens) of every tile of an image; 36 tokens to a tile, bars cut off."""
    tiles = len(call["pixel_values"])
    places = call.get("token_positions", np.arange(tiles * 36))
    tile_of = call.get("token_index", np.arange(tiles * 36)) // 36
    is_kept = np.isin(places, kept)
    return [(is_kept[tile_of == tile].mean(), int((tile_of == tile).sum())) for tile in np.unique(tile_of)]
