"""Asking bundles of families that are held against plain torch: two images of different shape, an expression about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from gap_export.bundle.folder import Bundle
from gap_export.pipeline.build import build_bundle
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.generate import Generation, generate
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.session import Session

IMAGES = (
    Image.linear_gradient("L").convert("RGB").resize((50, 31)),
    Image.effect_noise((33, 40), 90).convert("RGB"),
)
EXPRESSIONS = ("the red mug", "a cat")

PlainAnswer = tuple[list[int], list[int], list[int], list[Tensor]]
"""What plain torch says of one question: (kept, position ids, tokens, logits)."""


@dataclass(frozen=True)
class Bundles:
    """`bundles(**changes)`: a bundle of a recipe with changes, built on first use.

    Attributes:
        options: the recipe's fields.
        folder: of the bundles.
    """

    options: dict[str, Any]
    folder: Path
    _built: dict[str, Bundle] = field(default_factory=dict)

    def __call__(self, **changes: Any) -> Bundle:
        name = "-".join(f"{key}={changes[key]}" for key in sorted(changes)) or "default"
        if name not in self._built:
            recipe = Recipe.model_validate({"name": "small", **self.options, **changes})
            self._built[name] = build_bundle(recipe, self.folder / name, golden=False)
        return self._built[name]


def asked(session: Session, bundle: Bundle, rows: Sequence[int], new_tokens: int) -> Generation:
    """About these of the images, in one batch."""
    grounder = Grounder(bundle)
    return generate(
        session,
        grounder.prepare([IMAGES[row] for row in rows]),
        grounder.prompts([EXPRESSIONS[row] for row in rows], new_tokens).input_ids,
        max_new_tokens=new_tokens,
        eos_token_ids=(),
        keep_logits=True,
    )


def assert_answers(made: Generation, truth: Sequence[PlainAnswer]) -> None:
    """Choices, ids and tokens are the same, logits nearly so."""
    for row, (kept, positions, tokens, logits) in enumerate(truth):
        assert made.kept_indices[row].tolist() == kept
        assert made.placement.position_ids[row, : len(positions)].tolist() == positions
        assert made.tokens[row] == tokens
        for mine, theirs in zip(made.logits, logits, strict=True):
            np.testing.assert_allclose(mine[row], theirs.numpy(), atol=1e-3)


def difference(one: Sequence[PlainAnswer], other: Sequence[PlainAnswer]) -> float:
    """The least over all questions of the largest difference between first logits."""
    return min(
        float((mine[0] - theirs[0]).abs().max()) for (*_, mine), (*_, theirs) in zip(one, other, strict=True)
    )
