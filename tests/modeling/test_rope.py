"""Rotary embeddings whose frequencies follow the length of a row, against transformers', freshly loaded, this row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2_5_VLTextConfig, Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from gap_export.errors import CheckpointError
from gap_export.modeling import rope

TRAINED, WIDTH = 64, 16
LONG = {
    "short_factor": [1.0 + 0.1 * n for n in range(WIDTH // 2)],
    "long_factor": [2.0 + n for n in range(WIDTH // 2)],
    "original_max_position_embeddings": TRAINED // 2,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED // 4},
    "longrope": LONG,
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED // 4,
    },
}
"""What each kind needs besides the base."""

SIZES = {
    "hidden_size": 2 * WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": WIDTH,
    "max_position_embeddings": TRAINED,
}


def llama(kind: str, **changes: Any) -> LlamaConfig:
    given = {"rope_type": kind, "rope_theta": 100.0, **SETTINGS.get(kind, {}), **changes}
    return LlamaConfig(**SIZES, rope_parameters=given)


def qwen(config: Any, rotary: Any, kind: str) -> Any:
    settings = {"rope_type": kind, "rope_theta": 100.0, "mrope_section": [2, 3, 3], **SETTINGS[kind]}
    return rotary(config(**SIZES, rope_parameters=settings))


MODELS = {
    "llama": lambda kind: LlamaRotaryEmbedding(llama(kind)),
    "qwen2_vl": lambda kind: qwen(Qwen2VLTextConfig, Qwen2VLRotaryEmbedding, kind),
    "qwen3_vl": lambda kind: qwen(Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding, kind),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", rope.BY_LENGTH)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 2 * TRAINED - 2), min_size=1, max_size=4),
    gap=st.integers(0, TRAINED),
    seed=st.integers(0, 9),
)
def test_every_row_is_as_alone(model: str, kind: str, lengths: list[int], gap: int, seed: int) -> None:
    """Prefill, then two steps: rows with gaps in their ids, padded; each against a rotary embedding that has seen nothing else."""
    rng, tokens = np.random.default_rng(seed), max(lengths)
    ids = np.full((len(lengths), tokens), 3 * TRAINED)  # padding goes on counting
    for row, length in enumerate(lengths):
        ids[row, :length] = np.sort(rng.choice(length + gap, size=length, replace=False))
    last = np.array(lengths) - 1
    ends = ids[np.arange(len(lengths)), last]
    alone = [MODELS[model](kind) for _ in lengths]
    ours = rope.by_row(MODELS[model](kind))
    calls = [(ids, last), *((ends[:, None] + n, np.zeros_like(last)) for n in (1, 2))]
    for ids_BS, last_B in calls:
        given = torch.from_numpy(ids_BS)
        if model != "llama":
            given = torch.stack(
                [given, given // 2, given // 3]
            )  # (the largest id of text is that of its first row)
        own = rope.own_ids(ours, given, torch.from_numpy(last_B))
        cos, sin = ours(torch.zeros(1), own)
        for row, length in enumerate(last_B + 1):
            expected = alone[row](torch.zeros(1), given[..., row : row + 1, :length])
            assert torch.allclose(cos[row, :length], expected[0][0], atol=2e-6)
            assert torch.allclose(sin[row, :length], expected[1][0], atol=2e-6)


@pytest.mark.parametrize("kind", rope.BY_LENGTH)
def test_a_row_beside_a_long_one_would_differ_in_transformers(kind: str) -> None:
    """The control: what is held above is not what a batch gets there."""
    ids = torch.tensor([list(range(8)), list(range(2 * TRAINED - 8, 2 * TRAINED))])
    beside, _ = LlamaRotaryEmbedding(llama(kind))(torch.zeros(1), ids)
    alone, _ = LlamaRotaryEmbedding(llama(kind))(torch.zeros(1), ids[:1])
    ours, _ = rope.by_row(LlamaRotaryEmbedding(llama(kind)))(torch.zeros(1), ids)
    assert (beside[0] - alone[0]).abs().max() > 1e-2
    assert torch.allclose(ours[0], alone[0], atol=1e-6)


@pytest.mark.parametrize("kind", sorted(set(rope.KINDS) - set(rope.BY_LENGTH)))
def test_others_are_traced_as_they_are(kind: str) -> None:
    rotary = LlamaRotaryEmbedding(llama(kind))
    assert rope.by_row(rotary) is rotary
    rope.check(rotary.config, Path("config.json"))


def test_only_dynamic_knows_more_positions_than_it_was_trained_for() -> None:
    assert rope.max_positions(llama("dynamic", factor=2.5)) == 160
    assert {rope.max_positions(llama(kind)) for kind in rope.KINDS if kind != "dynamic"} == {TRAINED}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "proportional", "factor": 2.0}, r"'proportional' is not supported"),
        ({"rope_type": "dynamic", "factor": 0.5}, r"dynamic with factor 0\.5"),
        ({"rope_type": "dynamic", "factor": "2"}, r"dynamic with factor '2'"),
        ({"rope_type": "linear", "factor": float("inf")}, r"linear with factor inf"),
        ({"rope_type": "yarn"}, r"yarn is incomplete: .*factor"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, r"longrope is incomplete: .*long_factor"),
        ({"rope_type": "llama3", "factor": 8.0}, r"llama3 is incomplete"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, r"default with partial_rotary_factor 0\.5"),
        ({"rope_type": "default", "rope_theta": None}, r"default with rope_theta None"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": "10000"}, r"linear with rope_theta '10000'"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_named(settings: dict[str, Any], message: str) -> None:
    config = llama("default")
    config.rope_parameters = {"rope_theta": 100.0, **settings}
    with pytest.raises(CheckpointError, match=rf"rope_scaling of the decoder: {message}"):
        rope.check(config, Path("config.json"))


@pytest.mark.parametrize("config", [Qwen2VLTextConfig, Qwen2_5_VLTextConfig, Qwen3VLTextConfig])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        # The advice for long contexts, entered without the sections of the model.
        (
            {},
            r"mrope_section, which is not stated and by default is \[16, 24, 24\]: three numbers that add up to 8",
        ),
        ({"mrope_section": [2, 2, 2]}, r"mrope_section \[2, 2, 2\]: three numbers that add up to 8"),
        ({"mrope_section": [4, 4]}, r"mrope_section \[4, 4\]"),
        ({"mrope_section": "2,3,3"}, r"mrope_section '2,3,3'"),
    ],
)
def test_sections_fill_the_head(config: Any, given: dict[str, Any], message: str) -> None:
    settings = {"rope_type": "yarn", "rope_theta": 100.0, **SETTINGS["yarn"], **given}
    with pytest.raises(CheckpointError, match=message):
        rope.check(config(**SIZES, rope_parameters=settings), Path("config.json"))
    wide = {**SIZES, "head_dim": 128, "hidden_size": 256}
    unstated = {"rope_type": "default", "rope_theta": 100.0}
    rope.check(config(**wide, rope_parameters=unstated), Path("config.json"))
