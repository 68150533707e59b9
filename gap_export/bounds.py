"""What numbers from users may be, a row for every quantity: of options, of lists in options, and of arguments in Python.

Bounds are far beyond what makes sense and low enough that nothing hangs or asks for terabytes before an error says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gap_export.errors import InputError

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Bound:
    """The numbers that a quantity can be.

    Attributes:
        least: smallest.
        most: largest.
        whole: whether they are integers.
        above: whether they are above `least`, and cannot be it.
    """

    least: float
    most: float
    whole: bool = True
    above: bool = False

    @property
    def range(self) -> str:
        """The numbers, in words: `a whole number from 0 to 64`."""
        kind = "a whole number" if self.whole else "a number"
        if self.above:
            return f"{kind} above {self.least:.15g} and at most {self.most:.15g}"
        return f"{kind} from {self.least:.15g} to {self.most:.15g}"

    def read(self, text: str) -> int | float:
        """The number that a text is: plain digits, a point and an exponent where it need not be whole.

        Raises:
            ValueError: it is none, or out of bounds; the message says what it can be.
        """
        if not (_WHOLE if self.whole else _DECIMAL).fullmatch(text):
            raise ValueError(f"{_shortened(text)} is not {self.range}")
        value = int(text) if self.whole else float(text)
        if not self.holds(value):
            raise ValueError(f"{text} is not {self.range}")
        return value

    def holds(self, value: float) -> bool:
        """Whether it is such a number."""
        within = (self.least < value if self.above else self.least <= value) and value <= self.most
        return within and not isinstance(value, bool) and not (self.whole and value != int(value))


THREADS = Bound(0, 256)
COUNT = Bound(1, 10_000_000)
SHOWN = Bound(0, 10_000)
BATCH = Bound(1, 4096)
WORKERS = Bound(1, 1024)
REQUESTS = Bound(1, 1_000_000)
TOKENS = Bound(1, 1_000_000)
TEXT = Bound(2, 1_000_000)
IMAGES = Bound(1, 64)
LAYER = Bound(0, 10_000)
SLOTS = Bound(1, 10_000_000)
PIXELS = Bound(1, 1_000_000_000)
SEED = Bound(0, 2**53)
VOCABULARY = Bound(0, 10_000_000)
FRACTION = Bound(0, 1, whole=False, above=True)
SHARE = Bound(0, 1, whole=False)
TEMPERATURE = Bound(0, 100, whole=False)
PENALTY = Bound(0, 1000, whole=False, above=True)

_ARGUMENTS = {
    "threads": THREADS,
    "limit": COUNT,
    "rows": BATCH,
    "batch": BATCH,
    "workers": WORKERS,
    "requests": REQUESTS,
    "tokens": TOKENS,
    "new_tokens": TOKENS,
    "max_new_tokens": TOKENS,
    "worst": SHOWN,
    "drawn": SHOWN,
    "max_accuracy_drop": SHARE,
    "min_prediction_agreement": SHARE,
    "min_box_iou": SHARE,
}


def check(**given: float | None) -> None:
    """Refuse arguments that are out of bounds; None stands for a default.

    Args:
        given: by their names, which are the same in all functions.

    Raises:
        InputError: names the first.
    """
    for name, value in given.items():
        bound = _ARGUMENTS[name]
        if value is not None and not (isinstance(value, int | float) and bound.holds(value)):
            raise InputError(
                f"is not {bound.range}",
                subject=f"{name} {_shortened(repr(value))}",
                hint="choose another number",
            )


def several(text: str, bound: Bound, option: str) -> list[float]:
    """Numbers separated by commas, each once.

    Args:
        text: as given.
        bound: of every number.
        option: that it is given to, for the message.

    Raises:
        InputError: an entry is empty, no such number, or stands twice.
    """
    entries = [entry.strip() for entry in text.split(",")]
    try:
        if not all(entries):
            raise ValueError("has an empty entry")
        found = [bound.read(entry) for entry in entries]
    except ValueError as error:
        raise InputError(
            str(error), subject=f"{option} {_shortened(text)!r}", hint="separate numbers with single commas"
        ) from error
    _check_distinct(found, option)
    return found


def _check_distinct(found: Sequence[float], option: str) -> None:
    twice = next((entry for place, entry in enumerate(found) if entry in found[:place]), None)
    if twice is not None:
        raise InputError("is listed twice", subject=f"{option} {twice:g}", hint="leave one of them out")


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
