"""Numbers of requests and answers: of this process a part that no other has, and a count.

A random number for each would be a call of the system, and whoever makes one gives up Python's lock to threads that compute.
"""

from __future__ import annotations

import itertools
import secrets

_PROCESS = secrets.token_hex(10)
_COUNT = itertools.count(1)


def new_number() -> str:
    """32 hexadecimal digits, which no other request and no other answer has."""
    return f"{_PROCESS}{next(_COUNT):012x}"
