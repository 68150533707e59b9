"""The expressions of a data set about one image, answered together; those that the model cannot be asked are said to be refused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.session import Session


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


class Evaluator:
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
        self._grounder, self._session, self._keep = Grounder(bundle), session, keep
        self._share, self._rows = share, rows if share else 1

    def answer_image(self, image: Image.Image, expressions: Sequence[str]) -> list[Answered]:
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
        answers = (
            self._grounder.answer_image(
                self._session,
                [image] * self._grounder.images_per_prompt,
                askable,
                keep=self._keep,
                rows=self._rows,
                share=self._share,
            )
            if askable
            else []
        )
        found = dict(zip(askable, answers, strict=True))
        seconds = (time.perf_counter() - began) / len(expressions)
        return [
            Answered(answer.text, None, answer.new_tokens, tuple(answer.kept_indices.tolist()), seconds)
            if (answer := found.get(expression)) is not None
            else Answered("", refused[expression], 0, (), seconds)
            for expression in expressions
        ]

    def _refusals(self, expressions: list[str]) -> dict[str, str | None]:
        """Why each expression cannot be asked; seldom is one, so they are looked at one by one only then."""
        try:
            self._grounder.prompts(expressions)
        except InputError as error:
            if len(expressions) == 1:
                return {expressions[0]: error.message}
            return {each: why for one in expressions for each, why in self._refusals([one]).items()}
        return dict.fromkeys(expressions)
