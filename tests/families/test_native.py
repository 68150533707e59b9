"""Families that take images at their own shape, from a small checkpoint to answers: ONNX Runtime against transformers' own models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.bundle.folder import open_bundle
from gap_export.errors import EngineError, RecipeError
from gap_export.evaluation.validate_text import validate_text
from tests.families.answers import Asked, Families, assert_equal, prompts
from tests.families.contract import ENGINES, Case, Contract
from tests.families.tiny_families import NATIVE, ranged
from tests.graph.read_tokens import off, off_prefixes
from tests.prose import prose

pytestmark = pytest.mark.slow


def usual_of(tiny_family: Families, name: str) -> Asked:
    return tiny_family(name).asked(**ranged("divprune"))


class TestNativeResolution(Contract):
    families = NATIVE

    @pytest.mark.long
    @pytest.mark.parametrize("name", [*(family.name for family in NATIVE), "llava_next", "internvl"])
    def test_what_engines_lack_is_refused(self, tiny_family: Families, name: str) -> None:
        """The number of its rounds follows from the image."""
        pytest.importorskip(
            "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'"
        )
        with pytest.raises(EngineError, match="graph vision") as refused:
            tiny_family(name).bundle(**ranged("vispruner"), **ENGINES)
        assert "choose another pruner, or run the graph in ONNX Runtime" in refused.value.hint

    def test_places_of_patches_show(self, tiny_family: Families, usual: Case) -> None:
        asked = usual.asked(tiny_family)
        assert asked.changed(1.0, patch_positions=lambda places: places[:, :, ::-1].copy()) > 1e-2

    def test_windows_show(self, tiny_family: Families) -> None:
        """Tokens that sit in each other's windows: nothing else says who attends to whom."""
        asked = usual_of(tiny_family, "qwen2_5_vl")

        def exchanged(tokens_WM: Any) -> Any:
            exchange = {0: 7, 7: 0}
            return np.vectorize(lambda token: exchange.get(token, token))(tokens_WM)

        slots = asked.batch(1).calls[0]["token_slots"].copy()
        slots[[0, 7]] = slots[[7, 0]]
        assert asked.changed(1.0, window_tokens=exchanged, token_slots=lambda _: slots) > 1e-3

    def test_deepstack_planes_enter_the_decoder(self, tiny_family: Families) -> None:
        """Without them, with their order changed, and on the wrong tokens, answers are others."""
        asked = usual_of(tiny_family, "qwen3_vl")
        batch, session, spec = asked.batch(1), asked.session, asked.bundle.manifest.spec
        assert spec.deepstack_levels == 2
        visual = session.encode(batch.calls[0], keep_count=6)
        embeds = np.array(visual.embeds.numpy() if hasattr(visual.embeds, "numpy") else visual.embeds)
        own, deepstack_levels = np.split(embeds, [spec.hidden_size], axis=-1)
        assert embeds.shape[-1] == 3 * spec.hidden_size

        def logits(embeds: Any) -> Any:
            given = replace(
                visual,
                embeds=np.ascontiguousarray(embeds),
                kept_counts=np.array([6]),
                image_grid=batch.grids,
            )
            spliced = session.splice(prompts(1, 1), given)
            return session.prefill(spliced.embeds, spliced.placement).logits.copy()

        right = logits(embeds)
        for wrong in (
            np.zeros_like(deepstack_levels),
            np.roll(deepstack_levels, spec.hidden_size, axis=-1),
            np.roll(deepstack_levels, 1, axis=1),
        ):
            assert np.abs(logits(np.concatenate([own, wrong], axis=-1)) - right).max() > 1e-2

    def test_rows_of_a_text_are_those_of_the_decoder(self, tiny_family: Families, usual: Case) -> None:
        """All at once, with three rows of ids: `every_row.py`."""
        bundle = usual.asked(tiny_family).bundle
        assert bundle.manifest.spec.position_rows == 3
        ids = np.random.default_rng(2).integers(5, 40, (2, 9))
        assert off(bundle, ids, [[8, 8], [0, 5]]) < 1e-4
        assert off_prefixes(bundle, ids[:1]) < 1e-4

    def test_a_text_is_read_as_pytorch_reads_it(self, tiny_family: Families, tmp_path: Path) -> None:
        """M-RoPE, with three rows of ids: `validate --text`."""
        folder = usual_of(tiny_family, "qwen2_5_vl").bundle.folder
        bundle = open_bundle(shutil.copytree(folder, tmp_path / "bundle"))
        report = validate_text(bundle, prose(tmp_path), tokens=40, threads=1)
        assert report.prefill is not None
        assert max(report.prefill.mean_kl, report.steps.mean_kl) < 1e-6
        assert report.ok, report

    def test_max_pixels_bounds_tokens_and_cache(self, tiny_family: Families) -> None:
        wide = usual_of(tiny_family, "qwen2_vl")
        narrow = tiny_family("qwen2_vl").asked(**ranged("divprune"), max_pixels=16 * 64)
        one, other = narrow.bundle.manifest, wide.bundle.manifest
        assert one.spec.visual_tokens < other.spec.visual_tokens
        assert one.capacity < other.capacity
        assert narrow.batch(2).visual_tokens.max() <= 16 < wide.batch(2).visual_tokens.max()
        assert_equal(narrow.answer(2), narrow.true_answer(2))


def test_max_pixels_below_the_smallest_images_is_refused(tiny_family: Families) -> None:
    with pytest.raises(RecipeError, match="small images are scaled up to"):
        tiny_family("qwen2_vl").bundle(**ranged("divprune"), max_pixels=10)
