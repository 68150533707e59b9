"""Asking tiny models whose images differ in size: prompts of one image and of two, answers of the graphs and of the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.evaluation.controls import controls
from gap_export.inputs.batch import ImageBatch, Size
from gap_export.positions import Ids
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import Generation, generate
from gap_export.runtime.keep import keep_counts
from gap_export.runtime.session import Session
from gap_export.runtime.torch.staged import open_reference
from tests.families.reduced import IMAGE_TOKEN
from tests.families.tiny_families import TinyFamily

if TYPE_CHECKING:
    from gap_export.graph.trace_cache import Tracer

NEW_TOKENS = 20
TEMPLATES = {
    1: "USER : <image> where is {expression} ? ASSISTANT :",
    2: "USER : <image> and <image> where is {expression} ? ASSISTANT :",
}
PROMPTS = {
    1: [[1, 5, 6, IMAGE_TOKEN, 7, 8, 9], [1, IMAGE_TOKEN, 12, 13, 14, 15, 16, 17, 18]],
    2: [[1, 5, IMAGE_TOKEN, 6, IMAGE_TOKEN, 7, 8, 9], [IMAGE_TOKEN, 12, 13, 14, IMAGE_TOKEN, 15]],
}
"""Images in a prompt -> ids of the prompts of a batch."""

SIZES: dict[tuple[int, int], list[list[Size]]] = {
    (1, 1): [[(40, 30)]],
    (1, 2): [[(100, 70)], [(30, 90)]],
    (2, 1): [[(40, 30), (30, 90)]],
    (2, 2): [[(40, 30), (30, 90)], [(100, 70), (36, 36)]],
}
"""Images in a prompt, batch -> sizes of the images of every prompt."""


def noise(width: int, height: int) -> Image.Image:
    samples = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(samples)


def prompts(images: int, batch: int) -> Ids:
    """[B, T] ids, short rows padded."""
    rows = PROMPTS[images][:batch]
    ids = np.full((batch, max(map(len, rows))), -1, np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    return ids


def unpruned_prompt(tokens: list[int], visual_tokens: Ids) -> torch.Tensor:
    """[1, S] ids of a prompt with a placeholder for every visual token; `visual_tokens` [I] counts those of its images."""
    counts, ids = iter(visual_tokens.tolist()), []
    for token in tokens:
        ids += [token] * (next(counts) if token == IMAGE_TOKEN else 1)
    return torch.tensor([ids])


@cache
def whole_model(folder: Path) -> Any:
    """The model as a user of transformers has it."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


def answer(
    session: Session, bundle: Bundle, batch: ImageBatch, keep: float | None = None, **options: Any
) -> Generation:
    """Twenty tokens for every row."""
    manifest, images = bundle.manifest, bundle.manifest.prompt.images
    ids = prompts(images, len(batch.visual_tokens) // images)
    counts = keep_counts(manifest.pruning, manifest.spec, batch, keep)
    options = {"max_new_tokens": NEW_TOKENS, "keep_logits": True, **options}
    return generate(session, batch, ids, eos_token_ids=(), keep_counts=counts, **options)


@dataclass(frozen=True)
class Asked:
    """A bundle, opened. Nothing is asked twice: an answer without changes is computed once."""

    family: TinyFamily
    folder: Path
    bundle: Bundle
    _answers: dict[tuple[str, int, float | None], Generation] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """How many belong to one prompt."""
        return self.bundle.manifest.prompt.images

    @cached_property
    def session(self) -> Session:
        return open_session(self.bundle, "onnxruntime", threads=1)

    @cached_property
    def openvino(self) -> Session:
        return open_session(self.bundle, "openvino", threads=1)

    @cached_property
    def reference(self) -> Session:
        manifest = self.bundle.manifest
        return open_reference(manifest.family, self.folder, manifest.pruning)

    def sizes(self, batch: int) -> list[list[Size]]:
        return SIZES[self.images, batch]

    def batch(self, batch: int) -> ImageBatch:
        """Noise, as the bundle takes it."""
        manifest = self.bundle.manifest
        images = [noise(*size) for row in self.sizes(batch) for size in row]
        return manifest.layout.prepare(
            images, visual_tokens=manifest.spec.visual_tokens, per_prompt=self.images
        )

    def answer(self, batch: int, keep: float | None = None) -> Generation:
        """Of the graphs."""
        return self._once("session", batch, keep)

    def true_answer(self, batch: int, keep: float | None = None) -> Generation:
        """Of the reference."""
        return self._once("reference", batch, keep)

    def answer_of(self, who: str, batch: int, keep: float | None = None) -> Generation:
        """Of another runtime, by the name of its session here."""
        return self._once(who, batch, keep)

    def _once(self, who: str, batch: int, keep: float | None) -> Generation:
        key = who, batch, keep
        if key not in self._answers:
            self._answers[key] = answer(getattr(self, who), self.bundle, self.batch(batch), keep)
        return self._answers[key]

    def misled(self, batch: int, adjust: Any) -> float:
        """By how much logits change under a wrong placement; `adjust` as in `generate`."""
        right = self.answer(batch)
        wrong = answer(self.session, self.bundle, self.batch(batch), adjust=adjust)
        return float(max(np.abs(a - b).max() for a, b in zip(right.logits, wrong.logits, strict=True)))

    def moved_by(self, control: str) -> float:
        """By how much logits of a batch change under the control of that name."""
        before = np.array([tokens.index(IMAGE_TOKEN) for tokens in PROMPTS[self.images]])
        wrong = controls()[control]

        def adjust(placement: Any, visual: Any) -> Any:
            return wrong(placement, before, (visual.kept_indices >= 0).sum(axis=1))

        return self.misled(2, adjust)

    def changed(self, keep: float | None = None, **inputs: Callable[[Any], Any]) -> float:
        """By how much logits of one prompt change when inputs of the vision graph do."""
        batch = self.batch(1)
        (call,) = batch.calls
        wrong = {**call, **{name: change(call[name]) for name, change in inputs.items()}}
        right = self.answer(1, keep)
        off = answer(self.session, self.bundle, replace(batch, calls=(wrong,)), keep)
        return float(np.abs(right.logits[0] - off.logits[0]).max())


@dataclass(frozen=True)
class Tiny:
    """A checkpoint and bundles of it, built on first use.

    Attributes:
        family: what it is a checkpoint of.
        checkpoint: folder.
        folder: of the bundles.
        tracer: takes graphs from an earlier run.
    """

    family: TinyFamily
    checkpoint: Path
    folder: Path
    tracer: Tracer
    _asked: dict[str, Asked] = field(default_factory=dict)

    def bundle(self, **changes: Any) -> Bundle:
        """Not to be changed."""
        return self.asked(**changes).bundle

    def asked(self, **changes: Any) -> Asked:
        """The bundle with these fields of the recipe, and who answers from it."""
        from gap_export.pipeline.build import build

        key = "-".join(f"{name}={changes[name]}" for name in sorted(changes) if name != "prompt")
        if key not in self._asked:
            options = {
                "name": self.family.name,
                "checkpoint": str(self.checkpoint),
                "prompt": TEMPLATES[changes.get("images", 1)],
                "max_new_tokens": NEW_TOKENS,
                "max_text": 24,
                "max_batch": 2,
                **changes,
            }
            bundle = build(
                Recipe.model_validate(options), self.folder / key, golden=False, tracer=self.tracer
            ).bundle
            self._asked[key] = Asked(self.family, self.checkpoint, bundle)
        return self._asked[key]


Families = Callable[[str], Tiny]


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
