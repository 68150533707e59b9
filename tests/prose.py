"""A text for tiny models: words that their tokenizers know, in no order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conftest import WORDS


def prose(folder: Path, words: int = 400, *, name: str = "prose.txt") -> Path:
    """Write one, of so many words in lines of twelve."""
    known = [word for word in dict.fromkeys(WORDS.split()) if word.isalpha()]
    chosen = np.random.default_rng(11).choice(known, words)
    lines = (" ".join(chosen[first : first + 12]) for first in range(0, words, 12))
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path
