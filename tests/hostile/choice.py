"""Which of all inputs are run: a share of them in the long run, a few of every kind in the short one."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice

from tests.hostile.calls import call
from tests.hostile.cases import Case, of_parameter, of_source, of_surroundings
from tests.hostile.commands import Parameter
from tests.hostile.judge import REFUSED
from tests.hostile.sources import SOURCES, Source
from tests.hostile.world import World

KNOWN: dict[str, str] = {}
"""Patterns of inputs that the short run leaves out -> the fault that they show, until it is mended."""

_SLOW = {"bench", "validate", "sweep", "recommend", "golden", "serve"}
"""Commands whose harmless calls take seconds: of each, the short run tries what is refused at once."""
_SLOWLY_MADE = {"measured", "sweep", "choice", "sharded", "engines", "proven"}
"""Harmless files that take seconds to make: the short run does without."""
_FIRST = 60
"""The short run chooses among so many of the damages of a file: to make the later ones takes longer."""


def chosen(case: Case, seed: int, share: float) -> bool:
    """Whether an input is among the share of all that is run: the same ones for a seed, whatever else there is."""
    return zlib.crc32(f"{seed} {case.id!a}".encode()) < share * 2**32


def sample(world: World, parameters: Iterable[Parameter], *, seed: int, count: int) -> Iterator[Case]:
    """One input each of so many options, files and environments, chosen at random."""
    rng = random.Random(seed)
    parameters = tuple(parameters)
    commands = dict.fromkeys(parameter.command for parameter in parameters)
    origins: list[Callable[[], Iterable[Case]]] = [
        *(partial(of_parameter, parameter) for parameter in parameters),
        *(partial(of_source, source, world, seed, 0.1) for source in SOURCES if _is_quickly_made(source)),
        *(partial(of_surroundings, command) for command in commands if command not in _SLOW),
    ]
    for origin in rng.sample(origins, count):
        there = [case for case in islice(origin(), _FIRST) if _is_quick(case) and not is_known(case)]
        if there:
            yield rng.choice(there)


def _is_quickly_made(source: Source) -> bool:
    return call(source.call).command not in _SLOW and not _SLOWLY_MADE & set(call(source.call).needs)


def _is_quick(case: Case) -> bool:
    return case.twin.command not in _SLOW or case.expect == REFUSED


def is_known(case: Case) -> bool:
    """Whether the input shows a fault that is not mended yet."""
    return any(fnmatchcase(case.id, pattern) for pattern in KNOWN)
