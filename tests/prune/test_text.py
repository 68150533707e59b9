"""Strategies that read the expression: sign, scaling, the appended mean, the determinant that CDPruner makes large."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gap_export import prune
from gap_export.positions import MergedId
from gap_export.prune import VisionFeatures, cdpruner, reference, text_similarity, trim

READERS = [row.name for row in prune.PRUNERS.values() if row.needs_text]
GRID, VISUAL = (4, 5), 20


def features(seed: int = 0, batch: int = 2, projected: int = 32) -> VisionFeatures[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return VisionFeatures(
        patches=normal(VISUAL, 8),
        grid=GRID,
        projected=normal(VISUAL, projected),
        aligned=normal(VISUAL, 16),
        text=normal(16),
    )


def chosen(name: str, shown: VisionFeatures[torch.Tensor], kept: int) -> list[list[int]]:
    indices: list[list[int]] = (
        prune.load(name).select(shown, kept, seed=0, merged_id=MergedId.LAST_VISUAL).indices_BK.tolist()
    )
    return indices


@pytest.mark.parametrize("name", READERS)
def test_the_patch_that_matches_comes_first_under_both_signs(name: str) -> None:
    shown = features()
    assert shown.aligned is not None
    assert shown.text is not None
    shown.aligned[:, 7] = 3 * shown.text
    shown.aligned[:, 11] = -3 * shown.text
    assert [row[0] for row in chosen(name, replace(shown, aligned_inversely=False), 5)] == [7, 7]
    assert [row[0] for row in chosen(name, replace(shown, aligned_inversely=True), 5)] == [11, 11]


@pytest.mark.parametrize("name", READERS)
def test_another_expression_gives_another_choice(name: str) -> None:
    shown = features()
    assert shown.text is not None
    assert chosen(name, shown, 9) != chosen(name, replace(shown, text=shown.text.flip(1)), 9)


@pytest.mark.parametrize("name", READERS)
def test_a_tower_without_text_is_refused(name: str) -> None:
    for lacking in ("text", "aligned"):
        with pytest.raises(ValueError, match="need a text tower"):
            chosen(name, replace(features(), **{lacking: None}), 5)  # type: ignore[arg-type]


def test_only_trim_follows_the_length_of_a_patch() -> None:
    """Raw products there, cosines elsewhere."""
    shown = replace(features(), aligned_inversely=False)
    assert shown.aligned is not None
    longer = replace(shown, aligned=shown.aligned * torch.linspace(1.0, 9.0, VISUAL)[:, None])
    assert chosen("trim", longer, 9) != chosen("trim", shown, 9)
    torch.testing.assert_close(text_similarity.scores(longer), text_similarity.scores(shown))
    assert chosen("cdpruner", longer, 9) == chosen("cdpruner", shown, 9)


@pytest.mark.parametrize("kept", [2, 9, 20])
def test_the_last_token_of_trim_is_the_mean_of_what_was_dropped(kept: int) -> None:
    shown = features()
    selected = trim.select(shown, kept, seed=0, merged_id=MergedId.LAST_VISUAL)
    assert selected.patches_BKE is not None
    for row, indices in enumerate(selected.indices_BK.tolist()):
        own = indices[:-1]
        dropped = [token for token in range(VISUAL) if token not in own]
        torch.testing.assert_close(selected.patches_BKE[row, -1], shown.patches[row, dropped].mean(dim=0))
        assert torch.equal(selected.patches_BKE[row, :-1], shown.patches[row, own])
        assert indices[-1] == VISUAL - 1


def test_relevance_is_scaled_within_each_image() -> None:
    shown = features()
    assert shown.aligned is not None
    relevance = cdpruner.relevance(shown)
    assert relevance.amin(dim=1).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert relevance.amax(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    flat = cdpruner.relevance(replace(shown, aligned=torch.ones_like(shown.aligned)))
    assert flat.isfinite().all()
    assert (flat == flat[:, :1]).all()


def test_cdpruner_takes_what_makes_the_determinant_largest() -> None:
    """The kernel written out, and every candidate tried at every step."""
    shown = features(batch=1)
    assert shown.projected is not None
    relevance = cdpruner.relevance(shown)[0].double().numpy()
    tokens = shown.projected[0].double().numpy()
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    kernel = relevance[:, None] * (tokens @ tokens.T) * relevance
    expected: list[int] = []
    for _ in range(8):
        size = {
            token: np.linalg.slogdet(kernel[np.ix_([*expected, token], [*expected, token])])[1]
            for token in range(VISUAL)
            if token not in expected
        }
        expected.append(max(size, key=lambda token: size[token]))
    assert chosen("cdpruner", shown, 8) == [expected]


def test_what_the_chosen_ones_span_goes_by_relevance() -> None:
    """Four dimensions hold four tokens; after that nothing is new, and rounding must not decide."""
    shown = features(projected=4)
    relevance = cdpruner.relevance(shown)
    for row, indices in enumerate(chosen("cdpruner", shown, VISUAL)):
        assert sorted(indices) == list(range(VISUAL))
        rest = relevance[row, indices[4:]]
        assert (rest.diff() <= 0).all()


def test_the_reference_turns_the_sign_too() -> None:
    shown = features(batch=1)
    assert shown.aligned is not None
    assert shown.text is not None
    assert shown.projected is not None
    image = VisionFeatures(
        patches=shown.patches[0].double().numpy(),
        grid=GRID,
        projected=shown.projected[0].double().numpy(),
        aligned=shown.aligned[0].double().numpy(),
        text=shown.text[0].double().numpy(),
    )
    for name in READERS:
        signs = [
            reference.choose(
                name, replace(image, aligned_inversely=sign), 6, seed=0, merged_id=MergedId.LAST_VISUAL
            )
            for sign in (True, False)
        ]
        assert signs[0].indices_K.tolist() != signs[1].indices_K.tolist()
        for sign, choice in zip((True, False), signs, strict=True):
            assert chosen(name, replace(shown, aligned_inversely=sign), 6) == [choice.indices_K.tolist()]
