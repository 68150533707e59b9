"""Every expression about one image, answered together: the beginning of their prompts goes through the model once, where it can be shared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError
from gap_export.positions import PAD, Ids
from gap_export.runtime.generate import check_overflow
from gap_export.runtime.grounder import Grounder, keep_counts
from gap_export.runtime.session import Session
from gap_export.runtime.shared_prefix import answer_rest, common_length, prefill_shared, sharable


@dataclass(frozen=True)
class Answered:
    """One expression, answered.

    Attributes:
        text: the answer; empty where the expression was refused.
        refused: why the model could not be asked.
        tokens: generated.
        kept_indices: raster indices of the visual tokens that were kept of the last image.
        seconds: of the image's work, in equal parts among its expressions.
    """

    text: str
    refused: str | None
    tokens: int
    kept_indices: tuple[int, ...]
    seconds: float


class Answerer:
    """Asks a session about one image after the other.

    Args:
        bundle: opened.
        session: of it, or the reference of its checkpoint.
        keep: fraction of the visual tokens to keep, in bundles that let requests choose.
        share: whether prompts may share their beginning; one by one otherwise.
        rows: most expressions per call.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        *,
        keep: float | None = None,
        share: bool = True,
        rows: int = 8,
    ) -> None:
        manifest = bundle.manifest
        batch = manifest.graphs["embed"].spec.inputs[0].extents("maximum")[0]
        self._grounder, self._session, self._manifest = Grounder(bundle), session, manifest
        self._keep = keep
        self._share = share and sharable(manifest)
        self._rows = min(rows, batch) if share else 1

    def about(self, image: Image.Image, expressions: Sequence[str]) -> list[Answered]:
        """Answer expressions about one image.

        Args:
            image: RGB; a prompt with several images shows it in every place.
            expressions: at least one.

        Raises:
            InputError: an image that the model cannot take.
            SessionError: the runtime failed.
        """
        began = time.perf_counter()
        refused = self._refusals(list(dict.fromkeys(expressions)))
        askable = [expression for expression in refused if refused[expression] is None]
        answers = self._answers(image, askable) if askable else {}
        seconds = (time.perf_counter() - began) / len(expressions)
        answered = []
        for expression in expressions:
            text, tokens, kept = answers.get(expression, ("", 0, ()))
            answered.append(Answered(text, refused[expression], tokens, kept, seconds))
        return answered

    def _refusals(self, expressions: list[str]) -> dict[str, str | None]:
        """Why each expression cannot be asked; seldom is one, so they are looked at one by one only then."""
        try:
            self._grounder.prompts(expressions)
        except InputError as error:
            if len(expressions) == 1:
                return {expressions[0]: error.message}
            return {each: why for one in expressions for each, why in self._refusals([one]).items()}
        return dict.fromkeys(expressions)

    def _answers(
        self, image: Image.Image, expressions: Sequence[str]
    ) -> dict[str, tuple[str, int, tuple[int, ...]]]:
        """Expression -> (answer, generated tokens, visual tokens kept)."""
        images = [image] * self._grounder.images_per_prompt
        prompts = self._grounder.prompts(expressions).input_ids
        common = common_length(prompts, self._manifest.prompt.image_token_id) if self._share else 0
        found: dict[str, tuple[str, int, tuple[int, ...]]] = {}
        if not common:
            for first in range(0, len(expressions), self._rows):
                part = expressions[first : first + self._rows]
                run = self._grounder.ground(self._session, images * len(part), part, keep=self._keep)
                check_overflow(run.generation, self._session.backend)
                for expression, answer, tokens in zip(part, run.answers, run.generation.tokens, strict=True):
                    found[expression] = (
                        answer.text,
                        len(tokens),
                        tuple(answer.kept_indices.tolist()),
                    )
            return found
        batch = self._grounder.prepare(images)
        counts = keep_counts(self._manifest.pruning, self._manifest.spec, batch, self._keep)
        room = prompts.shape[1] - common + self._manifest.max_new_tokens
        prefix = prefill_shared(self._session, batch, prompts[0, :common], keep_counts=counts, room=room)
        kept = tuple(prefix.kept_indices.tolist())
        for first in range(0, len(expressions), self._rows):
            part = expressions[first : first + self._rows]
            decoded = answer_rest(
                self._session,
                prefix,
                _trimmed(prompts[first : first + self._rows, common:]),
                max_new_tokens=self._manifest.max_new_tokens,
                eos_token_ids=self._manifest.prompt.eos_token_ids,
            )
            check_overflow(decoded, self._session.backend)
            for expression, ids in zip(part, decoded.tokens, strict=True):
                found[expression] = (self._grounder.text_of(ids), len(ids), kept)
        return found


def _trimmed(ids_BT: Ids) -> Ids:
    """Without columns that are padding in every row."""
    longest = int((ids_BT != PAD).sum(axis=1).max())
    return np.ascontiguousarray(ids_BT[:, :longest])
