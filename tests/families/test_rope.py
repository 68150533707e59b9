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

import numpy as np
import pytest

from gap_export.errors import CheckpointError, RecipeError
from gap_export.graph.trace_cache import Tracer
from tests.families.answers import Asked, Families, Tiny, assert_equal
from tests.graph.read_tokens import Reader, off, off_prefixes

pytestmark = pytest.mark.slow

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
    text = config.get("text_config", config)
    text.update({"rope_theta": 100.0, "max_position_embeddings": positions, **fields})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def ask(tiny_family: Families, tmp_path: Path, tracer: Tracer) -> Callable[..., Asked]:
    """`ask(kind, fields={...}, ...)`: a bundle of a decoder with that kind; fields of its config and of the recipe may differ."""

    def asked(kind: str, **changes: Any) -> Asked:
        family, fields, positions = KINDS[kind]
        tiny = tiny_family(family)
        fields = {**fields, **changes.pop("fields", {})}
        checkpoint = with_rope(tiny.checkpoint, tmp_path / "checkpoint", fields, positions)
        return Tiny(tiny.family, checkpoint, tmp_path, tracer).asked(
            pruner="divprune", keep="0.3:0.5:1.0", **changes
        )

    return asked


def assert_rows_are_read(asked: Asked, kind: str) -> None:
    """All rows of a text at once (`every_row.py`) are those of the decoder, if it is short.

    Frequencies that follow the length are those of the row that is named, and so of all rows of the call.
    """
    ids = np.random.default_rng(2).integers(5, 40, (2, BORDER + 4))
    assert off(asked.bundle, ids[:, :9], [[8, 8], [0, 5]]) < 1e-4
    assert off_prefixes(asked.bundle, ids[:1, :9]) < 1e-4
    last = ids.shape[1] - 1
    assert off(asked.bundle, ids, [[last, last], [last, 3]], slots=192) < 1e-4
    if kind in ("dynamic", "longrope"):
        own, every = (Reader(asked.bundle, every_row=each) for each in (False, True))
        rows_SV, short_V = every.read(ids, [last, last], slots=192)[0], own.read(ids, [8, 8], slots=192)[0]
        assert np.abs(rows_SV[8] - short_V).max() > 1e-2, "or the border is not passed"


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
def test_graphs_answer_as_transformers(kind: str, ask: Callable[..., Asked]) -> None:
    """A short row beside a long one, pruned and whole; ids pass the border of the trained length on the way."""
    asked = ask(kind)
    for keep in (0.3, 1.0):
        assert_equal(asked.answer(2, keep), asked.true_answer(2, keep))
    assert_rows_are_read(asked, kind)
    if kind in ("dynamic", "longrope"):
        ends = asked.answer(2, 1.0).placement.next_position
        assert ends.min() - 20 < BORDER < ends.max() - 20, "both sides of the border, or nothing is tested"


def test_dynamic_ends_where_the_factor_ends(ask: Callable[..., Asked]) -> None:
    with pytest.raises(RecipeError, match="the model knows 160"):
        ask("dynamic", fields={"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}})


def test_other_kinds_end_where_they_were_trained(ask: Callable[..., Asked]) -> None:
    with pytest.raises(RecipeError, match="the model knows 1024"):
        ask("linear", max_text=1000)


def test_an_unknown_kind_is_named(ask: Callable[..., Asked]) -> None:
    with pytest.raises(CheckpointError, match="'su'"):
        ask("longrope", fields={"rope_scaling": {"type": "su", "factor": 2.0}})
