"""Images and expressions in, answers out: preprocessing, prompts and box codec around a session, as the manifest says.

`Model` is what most callers want; this is what it, validation and evaluations share.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from gap_export.boxes.codecs import CODECS, Box, Unparsable, to_pixels
from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError
from gap_export.inputs.batch import ImageBatch, Size
from gap_export.inputs.prompt import Prompts, decode_answer, encode_prompts, encode_text, unknown_words
from gap_export.inputs.tokenizer import load_tokenizer
from gap_export.positions import PAD, Ids
from gap_export.runtime.generate import Adjust, Generation, Timings, check_overflow, generate
from gap_export.runtime.keep import keep_counts
from gap_export.runtime.session import Session
from gap_export.runtime.shared_prefix import common_length, continue_answers, prefill_shared, unshared_because


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: as generated.
        boxes: every box in the text, in its order: (x1, y1, x2, y2) in pixels of the image as displayed (of the prompt's last
            one, where it has several), cut at its edges; boxes that lie beside it are left out.
        kept_indices: [K] int64 raster indices of the visual tokens of that image that are left at the end of the decoder.
        visual_tokens: of that image, before pruning.
        new_tokens: generated, the end token left out.
        finish_reason: `stop` where the model ended the answer, `length` where it was cut off at the longest length.
        timings: of the batch that the answer was made in.
    """

    text: str
    boxes: tuple[Box, ...]
    kept_indices: Ids
    visual_tokens: int
    new_tokens: int
    finish_reason: Literal["stop", "length"]
    timings: Timings

    @property
    def box(self) -> Box | None:
        """The first box; None where there is none."""
        return self.boxes[0] if self.boxes else None

    @property
    def keep(self) -> float:
        """Share of the image's visual tokens that were kept."""
        return len(self.kept_indices) / self.visual_tokens


@dataclass(frozen=True)
class Grounded:
    """A batch of answers and what they were made from.

    Attributes:
        answers: one per expression.
        boxes: the box that each answer refers to by the rule of the model's family, in pixels of the image; None where there is
            none on the image, or several and the rule takes but one.
        generation: of the batch.
        prompts: of the batch.
        batch: the images as the vision graph took them.
    """

    answers: list[Answer]
    boxes: list[Box | None]
    generation: Generation
    prompts: Prompts
    batch: ImageBatch


class Grounder:
    """Everything around a session.

    Args:
        bundle: opened.

    Attributes:
        tokenizer: of prompt and answers.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        self.tokenizer = load_tokenizer(bundle.tokenizer_path)
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
            adjust: changes the placement of every prompt, for negative controls.
            keep_logits: of all generated tokens, not of the first alone.

        Raises:
            InputError: an expression that is empty or does not fit, a fraction outside the range the bundle was built for, or
                another number of images.
        """
        manifest = self._manifest
        longest = self.longest(max_new_tokens)
        per_prompt = manifest.prompt.images
        if len(images) != per_prompt * len(expressions):
            raise InputError(
                f"{'is' if len(images) == 1 else 'are'} not {per_prompt} for every expression, as this bundle's prompt has",
                subject=f"{len(images)} image{'' if len(images) == 1 else 's'} for {len(expressions)} expressions",
                hint="give every image of the prompt, in its order",
            )
        began = time.perf_counter()
        prompts = self.prompts(expressions, longest)
        batch = self.prepare(images)
        text_ids = self.text_ids(expressions)
        preprocess = time.perf_counter() - began
        generation = generate(
            session,
            batch,
            prompts.input_ids,
            max_new_tokens=longest,
            eos_token_ids=manifest.prompt.eos_token_ids,
            text_ids_BL=text_ids,
            keep_counts=keep_counts(manifest.pruning, manifest.spec, batch, keep),
            adjust=adjust,
            keep_logits=keep_logits,
        )
        generation = replace(generation, timings=replace(generation.timings, preprocess=preprocess))
        last = images[per_prompt - 1 :: per_prompt]
        answers = [
            self._answer(tokens, ended, image, kept, int(count), generation.timings)
            for tokens, ended, image, kept, count in zip(
                generation.tokens,
                generation.ended,
                last,
                generation.kept_of_last,
                batch.visual_tokens[per_prompt - 1 :: per_prompt],
                strict=True,
            )
        ]
        boxes = [self._referred(answer.text, image.size) for answer, image in zip(answers, last, strict=True)]
        return Grounded(answers, boxes, generation, prompts, batch)

    def answer_image(
        self,
        session: Session,
        images: Sequence[Image.Image],
        expressions: Sequence[str],
        *,
        keep: float | None = None,
        max_new_tokens: int | None = None,
        rows: int | None = None,
        share: bool = True,
    ) -> list[Answer]:
        """Answer expressions about the same image; the beginning of their prompts, image included, goes through the model once
        where it can be shared.

        Args:
            session: of this bundle, or the reference of its checkpoint.
            images: RGB images of one prompt.
            expressions: at least one.
            keep: fraction of the visual tokens to keep, in bundles that let requests choose.
            max_new_tokens: longest answer; the manifest's by default.
            rows: most expressions per call; as many as the bundle takes when left out.
            share: whether prompts may share their beginning.

        Raises:
            InputError: an expression, an image or a fraction that cannot be used.
            SessionError: the runtime failed, or gave logits that are not numbers.
        """
        manifest, longest = self._manifest, self.longest(max_new_tokens)
        rows = min(rows or self.max_batch, self.max_batch)
        parts = [expressions[first : first + rows] for first in range(0, len(expressions), rows)]
        began = time.perf_counter()
        input_ids = self.prompts(expressions, longest).input_ids
        shares = share and self.unshared_because is None
        common = common_length(input_ids, manifest.prompt.image_token_id) if shares else 0
        answers: list[Answer] = []
        if not common:
            for part in parts:
                run = self.ground(
                    session, [*images] * len(part), part, keep=keep, max_new_tokens=max_new_tokens
                )
                check_overflow(run.generation, session.backend)
                answers += run.answers
            return answers
        batch = self.prepare(images)
        preprocess = time.perf_counter() - began
        with session.turn():  # all parts go on from one beginning in the cache
            prefix = prefill_shared(
                session,
                batch,
                input_ids[0, :common],
                keep_counts=keep_counts(manifest.pruning, manifest.spec, batch, keep),
                reserve=input_ids.shape[1] - common + longest,
            )
            for number, part in enumerate(parts):
                decoded = continue_answers(
                    session,
                    prefix,
                    _trimmed(input_ids[number * rows : number * rows + len(part), common:]),
                    max_new_tokens=longest,
                    eos_token_ids=manifest.prompt.eos_token_ids,
                )
                check_overflow(decoded, session.backend)
                timings = replace(decoded.timings, preprocess=preprocess)
                answers += [
                    self._answer(
                        tokens, ended, images[-1], prefix.kept_indices, int(batch.visual_tokens[-1]), timings
                    )
                    for tokens, ended in zip(decoded.tokens, decoded.ended, strict=True)
                ]
        return answers

    @cached_property
    def unshared_because(self) -> str | None:
        """Why `answer_image` answers each expression whole; None where the beginning of prompts is shared."""
        return unshared_because(self._manifest, self.tokenizer)

    @property
    def images_per_prompt(self) -> int:
        """I."""
        return self._manifest.prompt.images

    @property
    def max_batch(self) -> int:
        """Most expressions per call."""
        return self._manifest.graphs["embed"].spec.inputs[0].extents("maximum")[0]

    def prepare(self, images: Sequence[Image.Image]) -> ImageBatch:
        """Preprocess a batch of images."""
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
        return unknown_words(self.tokenizer, expression)

    def text_before(self, expressions: Sequence[str]) -> Ids:
        """[B] int64 text tokens before the image in the prompt of each expression."""
        return self.prompts(expressions).text_before

    def prompts(self, expressions: Sequence[str], max_new_tokens: int | None = None) -> Prompts:
        """Tokenized prompts, with capacity for answers of that length (by default the longest); see `encode_prompts`."""
        return encode_prompts(
            self.tokenizer,
            self._manifest.prompt,
            expressions,
            vocabulary=self._manifest.spec.vocabulary,
            kept=self._manifest.pruning.max_tokens,
            capacity=self._manifest.capacity,
            max_new_tokens=self._manifest.max_new_tokens if max_new_tokens is None else max_new_tokens,
        )

    def longest(self, max_new_tokens: int | None) -> int:
        """Longest answer, in tokens.

        Args:
            max_new_tokens: as asked; None for the longest that the bundle was built for.

        Raises:
            InputError: it was not built for so long a one.
        """
        most = self._manifest.max_new_tokens
        longest = most if max_new_tokens is None else max_new_tokens
        if not 1 <= longest <= most:
            raise InputError(
                f"must be between 1 and {most}, which this bundle was built for",
                subject=f"max_new_tokens {longest}",
                hint="ask for fewer, or build with a larger --max-new-tokens and the capacity for it",
            )
        return longest

    def _answer(
        self,
        tokens: list[int],
        ended: bool,
        image: Image.Image,
        kept: Ids,
        visual_tokens: int,
        timings: Timings,
    ) -> Answer:
        text = decode_answer(self.tokenizer, tokens)
        return Answer(
            text=text,
            boxes=self.boxes_in(text, image.size),
            kept_indices=kept,
            visual_tokens=visual_tokens,
            new_tokens=len(tokens),
            finish_reason="stop" if ended else "length",
            timings=timings,
        )

    def boxes_in(self, text: str, size: Size) -> tuple[Box, ...]:
        """Every box in a text, in its order.

        Args:
            text: an answer.
            size: (width, height) of the image that it is about, in pixels as displayed.

        Returns:
            (x1, y1, x2, y2) each, in pixels of the image, cut at its edges; those that lie beside it are left out.
        """
        decoded = self._codec.decode(text, self._manifest.layout.resized(size))
        found = () if isinstance(decoded, Unparsable) else decoded
        boxes = (self._on_image(box, size) for box in found)
        return tuple(box for box in boxes if box is not None)

    def _referred(self, text: str, size: Size) -> Box | None:
        """The box that an answer gives, in pixels of the image; None where there is none."""
        box = self._codec.decode_one(text, self._manifest.layout.resized(size))
        return None if isinstance(box, Unparsable) else self._on_image(box, size)

    def _on_image(self, box: Box, size: Size) -> Box | None:
        """A normalised box in pixels of the image, cut at its edges; None where it lies beside it."""
        pixels = to_pixels(box, self._manifest.box.frame, *size, clamp=True)
        return None if pixels[0] == pixels[2] or pixels[1] == pixels[3] else pixels


def _trimmed(ids_BT: Ids) -> Ids:
    """Without columns that are padding in every row."""
    longest = int((ids_BT != PAD).sum(axis=1).max())
    return np.ascontiguousarray(ids_BT[:, :longest])
