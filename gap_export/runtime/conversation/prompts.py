"""What all conversations with a bundle share: its template and tokenizers, how its images are prepared, how its boxes are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from gap_export import prune
from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError
from gap_export.inputs.chat.format import ChatFormat
from gap_export.inputs.chat.renderer import Renderer
from gap_export.inputs.chat.tokens import ChatTokens
from gap_export.inputs.prompt import encode_text
from gap_export.inputs.tokenizer import load_tokenizer
from gap_export.positions import Ids
from gap_export.runtime.conversation.cache import SeenImages
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.keep import check_keep, keep_counts

if TYPE_CHECKING:
    from gap_export.boxes.codecs import Box


def chat_format(bundle: Bundle) -> ChatFormat:
    """How free questions to a bundle become prompts.

    Args:
        bundle: opened.

    Raises:
        InputError: it answers none.
    """
    if bundle.manifest.chat is None:
        raise InputError(
            "answers no free questions: neither its checkpoint nor its family has a chat template",
            subject=str(bundle.folder),
            hint="put a chat_template.jinja beside the checkpoint's config.json, and build it again",
        )
    return bundle.manifest.chat


class ChatPrompts:
    """Everything around a session that free questions need, besides the conversation.

    Args:
        bundle: opened.
        grounder: of it: what prompts for boxes and free questions have in common.

    Attributes:
        manifest: of the bundle.
        tokenizer: of prompt and answers.
        tokens: conversations to token ids.
    """

    def __init__(self, bundle: Bundle, grounder: Grounder) -> None:
        self.manifest = manifest = bundle.manifest
        self.chat = chat_format(bundle)
        self.tokenizer = grounder.tokenizer
        self._grounder = grounder
        self._renderer = Renderer(bundle.chat_template, self.chat.variables)
        self.tokens = ChatTokens(
            self.tokenizer,
            self.chat,
            self._renderer,
            image_token_id=manifest.prompt.image_token_id,
            end_token_ids=manifest.prompt.eos_token_ids,
            vocabulary=manifest.spec.vocabulary,
        )
        self._pruner = prune.row(manifest.pruning.pruner)
        self._text_tokenizer = load_tokenizer(bundle.text_tokenizer_path) if manifest.text_tower else None

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.manifest.prompt.eos_token_ids

    def check_keep(self, keep: float | None) -> None:
        """Refuse a fraction of visual tokens that requests cannot choose.

        Args:
            keep: fraction, or None for the bundle's own.

        Raises:
            InputError: a fraction that the bundle was not built for.
        """
        check_keep(self.manifest.pruning, self.manifest.spec, keep)

    def seen_images(
        self, images: Sequence[Image.Image], keep: float | None, text_ids: Ids | None
    ) -> list[SeenImages]:
        """Images of a question, in calls of as many as the bundle's prompt has.

        Args:
            images: RGB images, at least one.
            keep: fraction of the visual tokens to keep, or None for the bundle's own.
            text_ids: [1, L] int64, for pruners that read text.

        Raises:
            InputError: another number of images than calls take.
        """
        manifest, step = self.manifest, self.manifest.prompt.images
        if len(images) % step:
            raise InputError(
                f"{'is' if len(images) == 1 else 'are'} given, and this bundle takes {step} at a time",
                subject=f"{len(images)} image{'' if len(images) == 1 else 's'}",
                hint=f"give {step} images with a question, or build without images: {step}",
            )
        batches = [
            self._grounder.prepare(images[first : first + step]) for first in range(0, len(images), step)
        ]
        return [
            SeenImages(batch, keep_counts(manifest.pruning, manifest.spec, batch, keep), text_ids)
            for batch in batches
        ]

    def check_reads_text(self) -> None:
        """Refuse a text to choose visual tokens by, where the pruner reads none.

        Raises:
            InputError: it reads none.
        """
        if not self._pruner.needs_text:
            raise InputError(
                "has no effect: this pruner does not look at any text but the prompt",
                subject=f"focus, pruner {self._pruner.name}",
                hint="leave it out, or build with a pruner that reads text: see `gap-export models`",
            )

    def text_ids(self, text: str, *, whole: bool) -> Ids | None:
        """[1, L] int64 of what the pruner reads; None where it reads no text.

        Args:
            text: a question, or what was given in its place.
            whole: whether all of it is read; of a question the pruner's own rule decides.

        Raises:
            InputError: the text tower cannot read it.
        """
        tower = self.manifest.text_tower
        if tower is None or self._text_tokenizer is None:
            return None
        read = text if whole else self._pruner.text_of(text)
        try:
            return encode_text(self._text_tokenizer, tower, [read])
        except InputError as error:
            raise InputError(
                f"{error.message}: {self._pruner.name} chooses visual tokens by it",
                subject="the question" if not whole else "focus",
                hint="name what the question is about in a few words: --focus WORDS",
            ) from error

    def notes_of_later_turns(self) -> list[str]:
        """What a question should know whose images were seen with an earlier one."""
        pruner = self._pruner
        if pruner.needs_text:
            return [f"{pruner.name} chose visual tokens by an earlier question; focus chooses them anew"]
        if pruner.in_decoder:
            return [
                f"{pruner.name} chose visual tokens by the first question; a new conversation chooses them anew"
            ]
        return []

    def boxes_in(self, text: str, size: tuple[int, int]) -> tuple[Box, ...]:
        """Every box in a text, in pixels of an image of that (width, height)."""
        return self._grounder.boxes_in(text, size)

    def close(self) -> None:
        """End the process that renders the template."""
        self._renderer.close()
