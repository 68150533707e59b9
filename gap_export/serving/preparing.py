"""From a request to what a row reads: images to pixels, questions to token ids, and everything that can be refused before the first computation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.errors import GapExportError, InputError
from gap_export.inputs.batch import ImageBatch, Size
from gap_export.inputs.chat.tokens import IMAGE
from gap_export.positions import Ids
from gap_export.runtime.conversation.cache import SeenImages, check_fits
from gap_export.runtime.conversation.prompts import ChatPrompts
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.keep import keep_counts
from gap_export.serving.work import Conversation, Expression, Question, Work


@dataclass(frozen=True)
class Prompted:
    """One question, ready to be read.

    Attributes:
        number: of the question in its request.
        question: as asked.
        ids: of the whole prompt, `IMAGE` for every image.
        text_ids: what the pruner reads with the images of every call of the splice graph, [1, L] int64; None where it reads no text.
        longest: most tokens of the answer.
    """

    number: int
    question: Question
    ids: tuple[int, ...]
    text_ids: tuple[Ids | None, ...]
    longest: int


@dataclass
class Prepared:
    """A request, ready to be read.

    Attributes:
        sizes: (width, height) of the images.
        batches: images as the vision graph takes them, one for every call of the splice graph.
        prompts: its questions, those left out that cannot be asked.
        faults: number of a question that cannot be asked -> why.
        seconds: that fetching and decoding images took.
        seen: images as they were encoded; questions share them where the pruner does not tell them apart.
    """

    sizes: Sequence[Size]
    batches: Sequence[ImageBatch]
    prompts: list[Prompted]
    faults: dict[int, GapExportError]
    seconds: float
    seen: dict[tuple[bytes | None, ...], list[SeenImages]] = field(default_factory=dict)


class Preparing:
    """Makes requests ready; may be called from several threads.

    Args:
        bundle: opened.
        grounder: of it.
        prompts: of it; None where it answers no free questions.
    """

    def __init__(self, bundle: Bundle, grounder: Grounder, prompts: ChatPrompts | None) -> None:
        self._manifest, self._grounder, self._prompts = bundle.manifest, grounder, prompts

    def prepare(self, work: Work, keep: float | None) -> Prepared:
        """Make a request ready.

        Args:
            work: as asked.
            keep: the largest fraction of the visual tokens that it may be answered with; None for the bundle's own.

        Raises:
            InputError: an image that cannot be used, or as many as this bundle's prompt does not take.
        """
        began = time.perf_counter()
        images = list(work.open_images())
        batches = self._batches(images)
        seconds = time.perf_counter() - began
        prepared = Prepared([image.size for image in images], batches, [], {}, seconds)
        for number, question in enumerate(work.questions):
            try:
                prompted = self._prompted(number, question, work, batches)
                seen = self.seen(prepared, prompted, keep)
                check_fits(self._manifest, prompted.ids, seen, prompted.longest)
            except GapExportError as error:
                prepared.faults[number] = error
            else:
                prepared.prompts.append(prompted)
        prepared.seen.clear()
        return prepared

    def seen(self, prepared: Prepared, prompted: Prompted, keep: float | None) -> list[SeenImages]:
        """The images of a question, as they are encoded: the same for all questions that the pruner does not tell apart.

        Args:
            prepared: the request.
            prompted: the question.
            keep: fraction of the visual tokens to keep, of all questions of the request; None for the bundle's own.

        Raises:
            InputError: a fraction that the bundle was not built for.
        """
        key = tuple(None if ids is None else ids.tobytes() for ids in prompted.text_ids)
        if key not in prepared.seen:
            pruning, spec = self._manifest.pruning, self._manifest.spec
            prepared.seen[key] = [
                SeenImages(batch, keep_counts(pruning, spec, batch, keep), text_ids)
                for batch, text_ids in zip(prepared.batches, prompted.text_ids, strict=True)
            ]
        return prepared.seen[key]

    def _batches(self, images: Sequence[Image.Image]) -> list[ImageBatch]:
        step = self._manifest.prompt.images
        if len(images) % step:
            raise self._not_whole_calls(len(images))
        return [self._grounder.prepare(images[first : first + step]) for first in range(0, len(images), step)]

    def _prompted(
        self, number: int, question: Question, work: Work, batches: Sequence[ImageBatch]
    ) -> Prompted:
        longest = work.options.max_new_tokens or self._manifest.max_new_tokens
        if isinstance(question, Expression):
            ids, text_ids = self._grounding(question.text, longest)
        else:
            ids, text_ids = self._free(question)
        if len(text_ids) != len(batches):
            raise InputError(
                f"has {ids.count(IMAGE)} images, and {sum(len(batch.visual_tokens) for batch in batches)} were given",
                subject="the prompt",
                hint="give as many as it has",
            )
        return Prompted(number, question, ids, text_ids, longest)

    def _grounding(self, expression: str, longest: int) -> tuple[tuple[int, ...], tuple[Ids | None, ...]]:
        (row,) = self._grounder.prompts([expression], self._grounder.longest(longest)).input_ids
        image = self._manifest.prompt.image_token_id
        ids = tuple(IMAGE if id_ == image else int(id_) for id_ in row)
        return ids, (self._grounder.text_ids([expression]),)

    def _free(self, question: Conversation) -> tuple[tuple[int, ...], tuple[Ids | None, ...]]:
        if self._prompts is None:
            raise InputError(
                "are not answered by this bundle: it has no chat template",
                subject="free questions",
                hint="ask for a box, or build it from a checkpoint with a chat template",
            )
        ids, step = self._prompts.tokens.prompt(question.turns, None).ids, self._manifest.prompt.images
        text_ids: list[Ids | None] = []
        for turn in question.turns:
            if turn.images % step:
                raise self._not_whole_calls(turn.images)
            if turn.images:  # what the pruner reads with images is the question that they came with
                text_ids += [self._prompts.text_ids(turn.text, whole=False)] * (turn.images // step)
        return ids, tuple(text_ids)

    def _not_whole_calls(self, images: int) -> InputError:
        step = self._manifest.prompt.images
        return InputError(
            f"{'is' if images == 1 else 'are'} given, and this bundle takes {step} at a time",
            subject=f"{images} image{'' if images == 1 else 's'}",
            hint=f"give {step} images",
        )
