"""The calibration text: prose that a decoder reads while it is built, so that the rounding of its weights can be compensated.

What was read of it becomes part of the bundle: `validate` builds the bundles that it compares with from there, wherever the file went.

Shape letters: B calls, S tokens of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gap_export.errors import InputError
from gap_export.files import kinds, read_text
from gap_export.inputs.prompt import encode_prose

CALIBRATION = "calibration.txt"
"""Its name in a bundle that was built with it."""

FEWEST_TOKENS, MOST_TOKENS = 512, 4096
_CALL_TOKENS = 512
_TOKEN_CHARACTERS = 16
"""More than a token of prose has on average, in any language."""


@dataclass(frozen=True)
class Calibration:
    """A text that was read.

    Attributes:
        text: as much of it as was looked at.
        ids_BS: int64, its tokens, in calls that do not see each other.
    """

    text: str
    ids_BS: NDArray[np.int64]


def read_calibration(path: Path, tokenizer: Tokenizer, *, vocabulary: int, max_positions: int) -> Calibration:
    """Read the beginning of a text.

    Args:
        path: of a file in UTF-8.
        tokenizer: of the model.
        vocabulary: rows of its token embedding.
        max_positions: that its decoder knows; calls are no longer.

    Returns:
        At most 4096 tokens, in calls of 512, or of as many as the decoder takes.

    Raises:
        InputError: it cannot be read, has fewer than 512 tokens, or a token that the model has no embedding of.
    """
    text = read_text(path, kinds.TEXT)[: MOST_TOKENS * _TOKEN_CHARACTERS]
    if "\0" in text:
        raise InputError("holds null bytes, as UTF-16 does", subject=str(path), hint=kinds.TEXT.hint)
    ids = encode_prose(tokenizer, text, vocabulary, subject=str(path))[:MOST_TOKENS]
    if len(ids) < FEWEST_TOKENS:
        raise InputError(
            f"has {len(ids)} tokens, and a calibration takes {FEWEST_TOKENS} to {MOST_TOKENS}",
            subject=str(path),
            hint="give a longer text",
        )
    tokens = min(_CALL_TOKENS, max_positions)
    calls = len(ids) // tokens
    return Calibration(text, np.array(ids[: calls * tokens], np.int64).reshape(calls, tokens))
