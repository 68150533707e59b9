"""The reference itself, against transformers' own `generate` where nothing is pruned and an uncached forward where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlavaForConditionalGeneration

from gap_export.bundle.manifest import Pruning
from gap_export.errors import CheckpointError
from gap_export.inputs.batch import of_one_size
from gap_export.positions import Ids, PositionPolicy
from gap_export.runtime.generate import Generation, generate
from gap_export.runtime.torch.session import TorchSession
from gap_export.runtime.torch.staged import open_reference

VISUAL, IMAGE = 36, 4


def pruning(
    pruner: str = "cls_attention", kept: int = 9, positions: PositionPolicy = PositionPolicy.GAP
) -> Pruning:
    return Pruning(pruner=pruner, keep=kept / VISUAL, kept=kept, positions=positions, seed=3)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()


def answer(session: TorchSession, pixels: NDArray[np.float32], ids: Ids, new: int = 5) -> Generation:
    return generate(
        session, of_one_size(pixels, 36), ids, max_new_tokens=new, eos_token_ids=(), keep_logits=True
    )


def test_unpruned_it_is_transformers_generate(
    model: Any, tiny_reference: Callable[[Pruning], Any], pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    """Placeholders repeated, ids and masks made by transformers: nothing of ours in the comparison."""
    mine = answer(tiny_reference(pruning("none", VISUAL)), pixels, ragged_ids)
    for row in range(4):
        text = [int(token) for token in ragged_ids[row] if token >= 0]
        image = text.index(IMAGE)
        expanded = torch.tensor([[*text[:image], *[IMAGE] * VISUAL, *text[image + 1 :]]])
        out = model.generate(
            input_ids=expanded,
            attention_mask=torch.ones_like(expanded),
            pixel_values=torch.from_numpy(pixels[[row]]),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert mine.tokens[row] == out.sequences[0, expanded.shape[1] :].tolist()
        for step, logits in enumerate(out.logits):
            assert np.abs(mine.logits[step][row] - logits[0].numpy()).max() < 1e-4


@pytest.mark.parametrize("policy", PositionPolicy)
def test_pruned_it_is_one_uncached_forward_over_the_survivors(
    policy: PositionPolicy,
    model: Any,
    tiny_reference: Callable[[Pruning], Any],
    pixels: NDArray[np.float32],
    ragged_ids: Ids,
) -> None:
    """Features by transformers' own `get_image_features`, ids written out by hand, a 4-D mask, no cache."""
    mine = answer(tiny_reference(pruning(positions=policy)), pixels, ragged_ids)
    with torch.inference_mode():
        got = model.get_image_features(pixel_values=torch.from_numpy(pixels))
        features = got.pooler_output if hasattr(got, "pooler_output") else got
        for row in range(4):
            text = torch.tensor([int(token) for token in ragged_ids[row] if token >= 0])
            image = text.tolist().index(IMAGE)
            kept = mine.kept_indices[row]
            fed = torch.tensor(mine.tokens[row][:-1], dtype=torch.int64)
            embed = model.get_input_embeddings()
            after = torch.cat([text[image + 1 :], fed])
            embeds = torch.cat([embed(text[:image]), features[row][torch.from_numpy(kept)], embed(after)])[
                None
            ]
            if policy is PositionPolicy.GAP:
                ids = [
                    *range(image),
                    *(image + int(i) for i in kept),
                    *(image + VISUAL + j for j in range(len(after))),
                ]
            else:
                ids = list(range(embeds.shape[1]))
            length = embeds.shape[1]
            mask = torch.zeros(1, 1, length, length).masked_fill(
                torch.ones(length, length).triu(1).bool(), torch.finfo(torch.float32).min
            )
            hidden = model.model.language_model(
                inputs_embeds=embeds, position_ids=torch.tensor([ids]), attention_mask=mask, use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden)[0].numpy()
            prompt = length - len(fed)
            for step in range(5):
                assert np.abs(mine.logits[step][row] - logits[prompt - 1 + step]).max() < 1e-4


@pytest.mark.parametrize("policy", PositionPolicy)
def test_survivors_are_those_the_class_token_looks_at_most(
    policy: PositionPolicy, model: Any, tiny_reference: Callable[[Pruning], Any], pixels: NDArray[np.float32]
) -> None:
    visual = tiny_reference(pruning(positions=policy)).encode({"pixel_values": pixels})
    with torch.inference_mode():
        seen = model.model.vision_tower(torch.from_numpy(pixels), output_attentions=True)
    scores = (
        seen.attentions[1].mean(dim=1)[:, 0, 1:].numpy()
    )  # of three layers, the second gives the features
    best = np.argsort(-scores, axis=1)[:, :9]
    assert np.allclose(visual.scores, scores, atol=1e-6)
    expected = best if policy is PositionPolicy.PERMUTED else np.sort(best, axis=1)
    assert visual.kept_indices.tolist() == expected.tolist()


@pytest.mark.parametrize("pruner", ["random", "spatial"])
def test_strategies_without_scores_keep_what_the_graph_keeps(
    pruner: str, tiny_reference: Callable[[Pruning], Any], pixels: NDArray[np.float32]
) -> None:
    from gap_export.prune.random import drawn_indices
    from gap_export.prune.reference.scores import grid_indices

    visual = tiny_reference(pruning(pruner)).encode({"pixel_values": pixels})
    expected = sorted(drawn_indices(VISUAL, 3)[:9]) if pruner == "random" else grid_indices((6, 6), 9)
    assert visual.kept_indices.tolist() == [expected] * 4
    assert visual.scores is None


def test_rows_of_equal_length_are_answered_as_alone(
    tiny_reference: Callable[[Pruning], Any], pixels: NDArray[np.float32], ragged_ids: Ids
) -> None:
    session = tiny_reference(pruning())
    mixed = ragged_ids[[0, 2, 0, 3]]
    together = answer(session, pixels, mixed)
    for row in range(4):
        alone = answer(session, pixels[[row]], mixed[[row]])
        assert alone.tokens[0] == together.tokens[row]
        assert all(
            np.abs(a[0] - b[row]).max() < 1e-4 for a, b in zip(alone.logits, together.logits, strict=True)
        )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "is not a folder"),
        ("no weights", r"has no model\.safetensors"),
        ("truncated", "is truncated"),
    ],
)
def test_a_checkpoint_that_does_not_load_is_an_error_of_ours(
    damage: str, said: str, checkpoint_copy: Path, tmp_path: Path
) -> None:
    weights = checkpoint_copy / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=said):
        open_reference("llava", tmp_path / "nowhere" if damage == "missing" else checkpoint_copy, pruning())
