"""Images and expressions in, boxes out: what `run`, `validate` and `eval` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from gap_export import prune
from gap_export.boxes.codecs import CODECS, Box, Unparsable, to_pixels
from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import ModelSpec, Pruning
from gap_export.errors import InputError
from gap_export.inputs.batch import ImageBatch
from gap_export.inputs.prompt import (
    Prompts,
    decode_answer,
    encode_prompts,
    encode_text,
    load_tokenizer,
    unknown_words,
)
from gap_export.positions import Ids
from gap_export.runtime.generate import Adjust, Generation, generate
from gap_export.runtime.session import Session


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: as generated.
        box: in pixels of the prompt's last image, clamped to it; None when the text holds no box, or one that lies in the padding.
        kept_indices: [K] int64 raster indices of the surviving visual tokens of that image.
    """

    text: str
    box: Box | None
    kept_indices: Ids


@dataclass(frozen=True)
class Grounded:
    """A batch of answers and what they were made from."""

    answers: list[Answer]
    generation: Generation
    prompts: Prompts
    batch: ImageBatch


class Grounder:
    """Everything around a session: preprocessing, prompt, box codec, as the manifest says.

    Args:
        bundle: opened.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        self._tokenizer = load_tokenizer(bundle.tokenizer_path)
        self._text_tower = bundle.manifest.text_tower
        self._text_tokenizer = load_tokenizer(bundle.text_tokenizer_path) if self._text_tower else None
        self._codec = CODECS[bundle.manifest.box.codec]

    def ground(
        self,
        session: Session,
        images: Sequence[Image.Image],
        expressions: Sequence[str],
        *,
        keep: float | None = None,
        max_new_tokens: int | None = None,
        adjust: Adjust | None = None,
        keep_logits: bool = False,
    ) -> Grounded:
        """Answer a batch.

        Args:
            session: of this bundle, or the reference of its checkpoint.
            images: RGB images, as many per expression as a prompt has; those of an expression follow each other.
            expressions: what to find.
            keep: fraction of the visual tokens to keep, in bundles that let requests choose.
            max_new_tokens: longest answer; the manifest's by default.
            adjust: see `generate`.
            keep_logits: see `generate`.

        Raises:
            InputError: an expression that is empty or does not fit, a fraction outside the range the bundle was built for, or
                another number of images.
        """
        manifest = self._manifest
        longest = max_new_tokens if max_new_tokens is not None else manifest.max_new_tokens
        if not 1 <= longest <= manifest.max_new_tokens:
            raise InputError(
                f"must be between 1 and {manifest.max_new_tokens}, which this bundle was built for",
                subject=f"max_new_tokens {longest}",
                hint="ask for fewer, or build with a larger --max-new-tokens and the capacity for it",
            )
        per_prompt = manifest.prompt.images
        if len(images) != per_prompt * len(expressions):
            raise InputError(
                f"{'is' if len(images) == 1 else 'are'} not {per_prompt} for every expression, as this bundle's prompt has",
                subject=f"{len(images)} image{'' if len(images) == 1 else 's'} for {len(expressions)} expressions",
                hint="give every image of the prompt, in its order",
            )
        prompts = self.prompts(expressions, longest)
        batch = self.prepare(images)
        generation = generate(
            session,
            batch,
            prompts.input_ids,
            max_new_tokens=longest,
            eos_token_ids=manifest.prompt.eos_token_ids,
            text_ids_BL=self.text_ids(expressions),
            keep_counts=keep_counts(manifest.pruning, manifest.spec, batch, keep),
            adjust=adjust,
            keep_logits=keep_logits,
        )
        answers = [
            self._answer(tokens, image, kept)
            for tokens, image, kept in zip(
                generation.tokens, images[per_prompt - 1 :: per_prompt], generation.kept_of_last, strict=True
            )
        ]
        return Grounded(answers=answers, generation=generation, prompts=prompts, batch=batch)

    @property
    def images_per_prompt(self) -> int:
        """I."""
        return self._manifest.prompt.images

    def prepare(self, images: Sequence[Image.Image]) -> ImageBatch:
        """See `ImageLayout.prepare`."""
        manifest = self._manifest
        return manifest.layout.prepare(
            images, visual_tokens=manifest.spec.visual_tokens, per_prompt=manifest.prompt.images
        )

    def text_ids(self, expressions: Sequence[str]) -> Ids | None:
        """[B, L] int64 ids of the expressions for the vision graph; None where the pruner does not look at them."""
        if self._text_tower is None or self._text_tokenizer is None:
            return None
        return encode_text(self._text_tokenizer, self._text_tower, expressions)

    def unknown_words(self, expression: str) -> tuple[str, ...]:
        """Parts of an expression that the model has no token for; it answers with a box all the same."""
        return unknown_words(self._tokenizer, expression)

    def text_before(self, expressions: Sequence[str]) -> Ids:
        """[B] int64 text tokens before the image in the prompt of each expression."""
        return self.prompts(expressions).text_before

    def prompts(self, expressions: Sequence[str], max_new_tokens: int | None = None) -> Prompts:
        """Tokenized prompts, with room for answers of that length (by default the longest); see `encode_prompts`."""
        return encode_prompts(
            self._tokenizer,
            self._manifest.prompt,
            expressions,
            kept=self._manifest.pruning.max_tokens,
            capacity=self._manifest.capacity,
            max_new_tokens=self._manifest.max_new_tokens if max_new_tokens is None else max_new_tokens,
        )

    def text_of(self, tokens: Sequence[int]) -> str:
        """The answer that generated tokens spell."""
        return decode_answer(self._tokenizer, tokens)

    def _answer(self, tokens: list[int], image: Image.Image, kept: Ids) -> Answer:
        text = decode_answer(self._tokenizer, tokens)
        box = self._codec.decode_one(text, self._manifest.layout.resized(image.size))
        if isinstance(box, Unparsable):
            return Answer(text=text, box=None, kept_indices=kept)
        pixels = to_pixels(box, self._manifest.box.frame, image.width, image.height, clamp=True)
        if pixels[0] == pixels[2] or pixels[1] == pixels[3]:
            return Answer(text=text, box=None, kept_indices=kept)
        return Answer(text=text, box=pixels, kept_indices=kept)


def keep_counts(
    pruning: Pruning, model: ModelSpec, batch: ImageBatch, keep: float | None
) -> list[int | None]:
    """How many tokens every call of the vision graph is told to keep; None where it is not told.

    Args:
        pruning: of the bundle.
        model: the same.
        images: of the batch.
        keep: fraction that the request asks for, or None for the bundle's own.

    Raises:
        InputError: a fraction outside the range that the bundle was built for.
        RecipeError: no fraction.
    """
    if model.token_range is None:
        # (`vision_inputs` refuses counts that the bundle has no room for.)
        count = None if keep is None else prune.kept_count(keep, model.visual_tokens)
        return [count] * len(batch.calls)
    if keep is not None and pruning.keep_range is None and keep != pruning.keep:
        raise InputError(
            f"cannot be chosen: this bundle keeps {pruning.keep:g} of every image",
            subject=f"keep {keep:g}",
            hint="build it with a range: --keep 0.1:1.0",
        )
    if (
        keep is not None
        and pruning.keep_range is not None
        and not pruning.keep_range[0] <= keep <= pruning.keep_range[1]
    ):
        raise InputError(
            f"is outside {pruning.keep_range[0]:g} to {pruning.keep_range[1]:g}, which this bundle was built for",
            subject=f"keep {keep:g}",
            hint="choose within the range, or build with a wider --keep",
        )
    share, at_least = pruning.keep if keep is None else keep, pruning.pruner_min_tokens
    return [prune.share_of(share, int(tokens), at_least) for tokens in batch.prunable]
