"""Reordered channels: the same function, other blocks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "bench" / "peers"))
import channel_order

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=False,
)


def logits_of(weights: dict[str, Any]) -> torch.Tensor:
    model = LlamaForCausalLM(CONFIG).eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    with torch.inference_mode():
        return model(torch.arange(20)[None]).logits


@pytest.fixture
def weights() -> dict[str, Any]:
    torch.manual_seed(0)
    return {key: 10 * value.numpy() for key, value in LlamaForCausalLM(CONFIG).state_dict().items()}


def test_same_function(weights: dict[str, Any]) -> None:
    reordered = channel_order.in_random_order(weights, CONFIG)
    assert logits_of(reordered).numpy() == pytest.approx(logits_of(weights).numpy(), abs=2e-3)
    changed = [key for key, value in reordered.items() if not np.array_equal(value, weights[key])]
    # Rows of q and k belong to rotations, so only their columns move; norms of ones stay as they are.
    assert len(changed) == len(weights) - 5


@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.down_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_control_where_one_matrix_keeps_its_order(part: str, weights: dict[str, Any]) -> None:
    reordered = channel_order.in_random_order(weights, CONFIG)
    key = f"model.layers.0.{part}.weight"
    difference = (logits_of({**reordered, key: weights[key]}) - logits_of(weights)).abs().max()
    assert difference > 1e-2
