"""What is timed: a loaded bundle and the request that it answers.

Shape letters: B batch, T text tokens, L tokens of an expression.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.inputs.batch import ImageBatch
from gap_export.inputs.prompt import encode_prompts, encode_text
from gap_export.inputs.tokenizer import load_tokenizer
from gap_export.positions import Ids
from gap_export.runtime.keep import KeepCounts, keep_counts
from gap_export.runtime.session import Session

EXPRESSION = "the small red circle on the left"
IMAGE = (480, 640)
"""Height and width of the noise that stands in for an image: those of most in RefCOCO."""


@dataclass(frozen=True)
class Candidate:
    """A loaded bundle and the request it answers.

    Attributes:
        name: unique among the candidates of a run.
        bundle: opened.
        session: the bundle, loaded.
        images: B of them.
        input_ids_BT: [B, T] int64, one placeholder per row.
        text_ids_BL: [B, L] int64, for pruners that look at the expression.
        keep_counts: what the graphs are told.
        keep: fraction that was asked for; the bundle's own when left out.
    """

    name: str
    bundle: Bundle
    session: Session
    images: ImageBatch
    input_ids_BT: Ids
    text_ids_BL: Ids | None = None
    keep_counts: KeepCounts | None = None
    keep: float | None = None

    @property
    def entering(self) -> int:
        """Visual tokens of the longest image as they enter the decoder."""
        kept = self.bundle.manifest.pruning.kept
        return kept if self.keep_counts is None else max(self.keep_counts.entering(self.images, kept))

    @property
    def kept(self) -> int:
        """Visual tokens that are left of it at the end of the decoder."""
        pruning = self.bundle.manifest.pruning
        if self.keep_counts is not None and self.keep_counts.stages is not None:
            return int(self.keep_counts.stages[:, :, -1].max())
        return pruning.kept_after_last_stage if pruning.stages else self.entering

    @property
    def prompt_slots(self) -> int:
        """Text tokens and visual tokens of the longest row as it enters the decoder; the placeholder itself takes no slot."""
        images = self.bundle.manifest.prompt.images
        return int(self.input_ids_BT.shape[1]) - images + images * self.entering

    def capacities(self, new_tokens: int) -> tuple[int, ...]:
        """Cache slots of every stage that the session lays out for the request."""
        layout = self.bundle.manifest.cache_layout
        gone = None if self.keep_counts is None else self.keep_counts.gone(self.images)
        return layout.slots_for(layout.lengths_of(self.prompt_slots + new_tokens, gone))


def candidate(
    name: str, bundle: Bundle, session: Session, *, batch: int = 1, keep: float | None = None
) -> Candidate:
    """A candidate with a stand-in request: the bundle's own prompt around a short expression, noise for an image.

    What a dense model costs depends on shapes, not on values.

    Args:
        name: unique among the candidates of a run.
        bundle: opened.
        session: the bundle, loaded.
        batch: images per request.
        keep: fraction of the visual tokens to keep, in bundles that let requests choose.

    Raises:
        InputError: a fraction that cannot be chosen, or the prompt and the bundle's longest answer do not fit into the cache.
    """
    manifest = bundle.manifest
    prompts = encode_prompts(
        load_tokenizer(bundle.tokenizer_path),
        manifest.prompt,
        [EXPRESSION] * batch,
        vocabulary=manifest.spec.vocabulary,
        kept=manifest.pruning.kept,
        capacity=manifest.capacity,
        max_new_tokens=manifest.max_new_tokens,
    )
    noise = np.random.default_rng(0).integers(0, 256, (*IMAGE, 3), np.uint8)
    per_prompt = manifest.prompt.images
    images = manifest.layout.prepare(
        [Image.fromarray(noise)] * batch * per_prompt,
        visual_tokens=manifest.spec.visual_tokens,
        per_prompt=per_prompt,
    )
    text_ids = None
    if manifest.text_tower is not None:
        text_ids = encode_text(
            load_tokenizer(bundle.text_tokenizer_path), manifest.text_tower, [EXPRESSION] * batch
        )
    counts = keep_counts(manifest.pruning, manifest.spec, images, keep)
    return Candidate(name, bundle, session, images, prompts.input_ids, text_ids, counts, keep)
