"""How much memory one contender takes while it answers, measured in a process that holds nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from gap_export.environment import peak_rss_bytes
from gap_export.errors import MissingRequirementError
from gap_export.evaluation.latency.measure import Contender, time_request

_TOKENS = 4


def peak_of(make_contender: Callable[[], Contender]) -> int | None:
    """Largest resident memory of a process that opens a bundle and answers one request, bytes; None where nobody tells.

    Args:
        make_contender: can be pickled.

    Raises:
        GapExportError: the bundle cannot be opened or asked.
        MissingRequirementError: the process was killed, most probably for its memory.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        try:
            return child.submit(_peak, make_contender).result()
        except BrokenProcessPool as error:
            raise MissingRequirementError(
                "was killed while its memory was measured",
                subject="a process",
                hint="it may need more memory than there is; --no-memory leaves this out",
            ) from error


def _peak(make_contender: Callable[[], Contender]) -> int | None:
    each = make_contender()
    time_request(each, min(_TOKENS, each.bundle.manifest.max_new_tokens))
    return peak_rss_bytes()
