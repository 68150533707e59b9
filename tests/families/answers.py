"""Asking models whose images differ in size: two images, two prompts, answers of the graphs and of the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.evaluation.controls import controls
from gap_export.inputs.batch import ImageBatch
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import Generation, generate
from gap_export.runtime.grounder import keep_counts
from gap_export.runtime.torch.staged import open_reference

from .conftest import IMAGE_TOKEN, Tiny

NEW_TOKENS = 20
SIZES = {1: [(40, 30)], 2: [(100, 70), (30, 90)]}
PROMPTS = [[1, 5, 6, IMAGE_TOKEN, 7, 8, 9], [1, IMAGE_TOKEN, 12, 13, 14, 15, 16, 17, 18]]

Families = Callable[[str], Tiny]


def images(batch: int) -> list[Image.Image]:
    """Noise of the sizes of a batch."""
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES[batch]]


def prompts(batch: int) -> Any:
    """[B, T] ids, short rows padded."""
    rows = PROMPTS[:batch]
    ids = np.full((batch, max(map(len, rows))), -1, np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    return ids


def images_of(bundle: Bundle, batch: int) -> ImageBatch:
    """The batch, as the bundle takes it."""
    manifest = bundle.manifest
    return manifest.layout.prepare(images(batch), visual_tokens=manifest.spec.visual_tokens)


def moved_by(control: str, prompts: list[list[int]], ask: Callable[..., Generation]) -> float:
    """By how much logits change under a wrong placement.

    Args:
        control: name in `controls.controls`.
        prompts: of both rows.
        ask: called with `adjust`, see `generate`.
    """
    before = np.array([tokens.index(IMAGE_TOKEN) for tokens in prompts])
    wrong = controls()[control]

    def adjust(placement: Any, visual: Any) -> Any:
        return wrong(placement, before, (visual.kept_indices >= 0).sum(axis=1))

    right, off = ask(), ask(adjust=adjust)
    return float(max(np.abs(a - b).max() for a, b in zip(right.logits, off.logits, strict=True)))


def answer(session: Any, bundle: Bundle, batch: int, keep: float | None = None, **options: Any) -> Generation:
    """Twenty tokens for every row."""
    of_images = images_of(bundle, batch)
    return generate(
        session,
        of_images,
        prompts(batch),
        max_new_tokens=NEW_TOKENS,
        eos_token_ids=(),
        keep_counts=keep_counts(bundle.manifest.pruning, bundle.manifest.spec, of_images, keep),
        keep_logits=True,
        **options,
    )


def both(tiny: Tiny, bundle: Bundle, batch: int, keep: float | None = None) -> tuple[Generation, Generation]:
    """The answer of the graphs, and that of the reference."""
    manifest = bundle.manifest
    reference = open_reference(manifest.family, tiny.folder, manifest.pruning)
    return answer(open_session(bundle, "onnxruntime", threads=1), bundle, batch, keep), answer(
        reference, bundle, batch, keep
    )


def assert_equal(mine: Generation, theirs: Generation) -> None:
    """Choices, ids and tokens are the same, logits nearly so."""
    np.testing.assert_array_equal(mine.kept_indices, theirs.kept_indices)
    for row, last in enumerate(theirs.placement.last_index):
        ids, expected = (run.placement.position_ids[..., row, : last + 1] for run in (mine, theirs))
        np.testing.assert_array_equal(ids, expected)
    assert mine.tokens == theirs.tokens
    assert len(mine.tokens[0]) == NEW_TOKENS
    difference = max(np.abs(a - b).max() for a, b in zip(mine.logits, theirs.logits, strict=True))
    assert difference <= 1e-3


@cache
def whole_model(folder: Path) -> Any:
    """The model as a user of transformers has it."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()


def unpruned_prompt(row: int, visual_tokens: int) -> list[int]:
    """Ids of a prompt with a placeholder for every visual token."""
    ids: list[int] = []
    for token in PROMPTS[row]:
        ids += [token] * (visual_tokens if token == IMAGE_TOKEN else 1)
    return ids
