"""Graphs in which the number of kept tokens is not fixed: chosen by the request, or found in the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import Pruning
from gap_export.errors import InputError
from gap_export.modeling.splice import Splice
from gap_export.positions import PAD, Ids, PositionPolicy, place
from gap_export.runtime.ort import OnnxRuntimeSession

TOTAL, IMAGE, HIDDEN = 36, 4, 4
RANGE = "0.1:0.25:1.0"


def fixed_at(pruning: Pruning, kept: int) -> Pruning:
    """The same with one count for all images."""
    counts = {"keep": kept / TOTAL, "kept": kept, "min_tokens": kept, "max_tokens": kept}
    return pruning.model_copy(update={**counts, "keep_mode": "fixed"})


def answer(session: OnnxRuntimeSession, pixels: Any, ids: Ids, **options: Any) -> Any:
    """(kept, position ids, logits of the prefill and one step)."""
    visual = session.encode({"pixel_values": pixels}, **options)
    spliced = session.splice(ids, visual)
    logits = session.prefill(spliced.embeds, spliced.placement).logits
    return visual.kept_indices, spliced.placement, logits


@pytest.mark.parametrize("policy", list(PositionPolicy))
def test_a_chosen_count_answers_like_a_fixed_one(
    policy: PositionPolicy,
    tiny_bundle: Callable[..., Bundle],
    pixels: NDArray[np.float32],
    ragged_ids: Ids,
) -> None:
    chosen = OnnxRuntimeSession(tiny_bundle(keep=RANGE, positions=policy), threads=1)
    fixed = OnnxRuntimeSession(tiny_bundle(positions=policy), threads=1)
    kept, placement, logits = answer(chosen, pixels, ragged_ids, keep_count=9)
    kept_there, placement_there, logits_there = answer(fixed, pixels, ragged_ids)
    assert kept.tolist() == kept_there.tolist()
    assert placement.position_ids.tolist() == placement_there.position_ids.tolist()
    assert placement.next_slot.tolist() == placement_there.next_slot.tolist()
    np.testing.assert_allclose(logits, logits_there, rtol=0, atol=1e-5 * np.abs(logits_there).max())


def test_one_session_serves_every_count(
    tiny_bundle: Callable[..., Bundle],
    tiny_reference: Callable[..., Any],
    pixels: NDArray[np.float32],
    ragged_ids: Ids,
) -> None:
    bundle = tiny_bundle(keep=RANGE)
    session = OnnxRuntimeSession(bundle, threads=1)
    for count in (4, 36, 17, 5):
        reference = tiny_reference(fixed_at(bundle.manifest.pruning, count))
        kept, placement, logits = answer(session, pixels, ragged_ids, keep_count=count)
        kept_there, placement_there, logits_there = answer(reference, pixels, ragged_ids)
        assert kept.shape == (4, count)
        assert kept.tolist() == kept_there.tolist()
        assert placement.next_position.tolist() == placement_there.next_position.tolist()
        np.testing.assert_allclose(logits, logits_there, rtol=0, atol=1e-5 * np.abs(logits_there).max())
    for count in (3, 37):
        with pytest.raises(InputError, match="is outside 4 to 36"):
            session.encode({"pixel_values": pixels}, keep_count=count)


def test_the_count_is_a_scalar_input(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle(keep=RANGE)
    vision = ort.InferenceSession(str(bundle.graph_path("vision")))
    count = next(value for value in vision.get_inputs() if value.name == "keep_count")
    assert (count.type, count.shape) == ("tensor(int64)", [])
    assert [value.shape for value in vision.get_outputs()] == [["batch", "kept", 32], ["batch", "kept"]]
    pruning = bundle.manifest.pruning
    assert (pruning.keep_mode, pruning.min_tokens, pruning.kept, pruning.max_tokens) == ("dynamic", 4, 9, 36)


# Rows of different length


@settings(max_examples=60)
@given(data=st.data())
def test_splice_places_text_after_the_last_real_token_of_its_row(data: st.DataObject) -> None:
    policy = data.draw(st.sampled_from(list(PositionPolicy)))
    rows, visual = data.draw(st.integers(1, 3)), 12
    counts = np.array(data.draw(st.lists(st.integers(1, 6), min_size=rows, max_size=rows)))
    before = np.array(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))
    after = np.array(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))
    longest = int(counts.max()) + data.draw(st.integers(0, 2))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    kept = np.full((rows, longest), PAD)
    ids = np.full((rows, int((before + after).max()) + 1), -1)
    for row in range(rows):
        kept[row, : counts[row]] = np.sort(random.choice(visual, counts[row], replace=False))
        text = random.integers(5, 20, before[row] + after[row])
        ids[row, : len(text) + 1] = np.insert(text, before[row], IMAGE)
    embeds = random.normal(size=(rows, longest, HIDDEN)).astype(np.float32)

    embedding = nn.Embedding(20, HIDDEN)
    splice = Splice(embedding, image_token_id=IMAGE, visual_tokens=visual, policy=policy)
    with torch.inference_mode():
        spliced, position_ids, next_position, next_slot = (
            tensor.numpy()
            for tensor in splice(
                torch.from_numpy(ids),
                torch.from_numpy(embeds),
                torch.from_numpy(kept),
                torch.from_numpy(counts),
            )
        )
    expected = place(kept, text_before=before, text_after=after, visual_tokens=visual, policy=policy)
    assert next_slot.tolist() == expected.next_slot.tolist()
    assert next_position.tolist() == expected.next_position.tolist()
    table = embedding.weight.detach().numpy()
    for row in range(rows):
        length = int(next_slot[row])
        assert position_ids[row, :length].tolist() == expected.position_ids[row, :length].tolist()
        text = [token for token in ids[row] if token not in (-1, IMAGE)]
        own = np.concatenate(
            [table[text[: before[row]]], embeds[row, : counts[row]], table[text[before[row] :]]]
        )
        assert np.array_equal(spliced[row, :length], own)
