"""Every kind of rotary embedding, in published spellings, from config.json to answers: ONNX Runtime against transformers.

The reference runs every row alone, with a rotary embedding that has seen no other request: in transformers a row beside a long one is
turned by the frequencies of that one (`dynamic`, `longrope`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import Bundle
from gap_export.errors import CheckpointError, RecipeError
from gap_export.graph.trace_cache import Tracer
from gap_export.pipeline.build import build
from gap_export.recipe.recipe import Recipe

from .answers import Families, assert_equal, both
from .conftest import PROMPT, Tiny

HALF = 8
"""Frequencies of the tiny decoders: half of the width of a head."""

BORDER = 160
"""Positions up to which `dynamic` and `longrope` are as trained: between the short prompt and the long one, whole."""

KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    # As InternVL3-8B's config.json has it.
    "dynamic": ("internvl", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, BORDER),
    "longrope": (
        "llava_next",
        {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.1 * n for n in range(HALF)],
                "long_factor": [2.0 + n for n in range(HALF)],
                "original_max_position_embeddings": BORDER,
            }
        },
        1024,
    ),
    # As Qwen's model cards tell to enter it for long contexts, and here with the sections of M-RoPE.
    "yarn": (
        "qwen2_5_vl",
        {
            "rope_scaling": {
                "type": "yarn",
                "mrope_section": [2, 3, 3],
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        1024,
    ),
    "llama3": (
        "llava_next",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        1024,
    ),
    # As in vicuna-7b-v1.5-16k's config.json.
    "linear": ("llava_onevision", {"rope_scaling": {"factor": 4.0, "type": "linear"}}, 1024),
}
"""Kind -> (family, fields of the decoder's config, positions it was trained for)."""


def with_rope(checkpoint: Path, folder: Path, fields: dict[str, Any], positions: int) -> Path:
    """A copy of a checkpoint whose decoder has other settings, in the spelling of older configs: `rope_theta` beside them."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text.pop("rope_parameters")
    text.update({"rope_theta": 100.0, "max_position_embeddings": positions, **fields})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def build_with(tiny_family: Families, tmp_path: Path, tracer: Tracer) -> Callable[..., tuple[Tiny, Bundle]]:
    def made(kind: str, **changes: Any) -> tuple[Tiny, Bundle]:
        family, fields, positions = KINDS[kind]
        fields = {**fields, **changes.pop("fields", {})}
        tiny = tiny_family(family)
        folder = with_rope(tiny.folder, tmp_path / "checkpoint", fields, positions)
        options = {
            "name": "tiny",
            "checkpoint": str(folder),
            "prompt": PROMPT,
            "max_new_tokens": 20,
            "max_text": 24,
            "max_batch": 2,
            "pruner": "divprune",
            "keep": "0.3:0.5:1.0",
            **changes,
        }
        bundle = build(Recipe.model_validate(options), tmp_path / "bundle", tracer=tracer).bundle
        return Tiny(family, folder, tiny.bundle), bundle

    return made


@pytest.mark.parametrize(
    "kind",
    # The last two differ from the third in constants alone (`tests/modeling/test_rope.py`), and take as long.
    [
        "dynamic",
        "longrope",
        "yarn",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("llama3", "linear")),
    ],
)
def test_graphs_answer_as_transformers(kind: str, build_with: Any) -> None:
    """A short row beside a long one, pruned and whole; ids pass the border of the trained length on the way."""
    tiny, bundle = build_with(kind)
    for keep in (0.3, 1.0):
        mine, theirs = both(tiny, bundle, 2, keep)
        assert_equal(mine, theirs)
    if kind in ("dynamic", "longrope"):
        ends = mine.placement.next_position
        assert ends.min() - 20 < BORDER < ends.max() - 20, "both sides of the border, or nothing is tested"


def test_dynamic_ends_where_the_factor_ends(build_with: Any) -> None:
    with pytest.raises(RecipeError, match="the model knows 160"):
        build_with("dynamic", fields={"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}})


def test_other_kinds_end_where_they_were_trained(build_with: Any, tiny_family: Families) -> None:
    with pytest.raises(RecipeError, match="the model knows 1024"):
        build_with("linear", max_text=1000)


def test_an_unknown_kind_is_named(build_with: Any) -> None:
    with pytest.raises(CheckpointError, match="'su'"):
        build_with("longrope", fields={"rope_scaling": {"type": "su", "factor": 2.0}})
