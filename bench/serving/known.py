"""Answers that are known before a server is asked: of every request alone, with every share of visual tokens that it may be answered with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gap_export.runtime.model import load
from serving.asked import Request, Said, alone

Answers = dict[tuple[int, float], tuple[Said, ...]]


class Known:
    """What requests are answered with.

    Args:
        requests: all of them.
        answers: (number of a request, fraction of the visual tokens) -> its answer.
        keep: the bundle's own fraction.
        chosen: fractions that the server may choose for requests that choose none; the bundle's own alone by default.
    """

    def __init__(
        self, requests: Sequence[Request], answers: Answers, keep: float, chosen: Sequence[float] = ()
    ) -> None:
        self._numbers = {id(request): number for number, request in enumerate(requests)}
        self._answers, self._keep, self._chosen = answers, keep, tuple(chosen) or (keep,)

    def __call__(self, request: Request, used: float | None) -> Sequence[Said]:
        """The answer; an empty one, which none is equal to, where the server chose a fraction that it may not choose.

        Args:
            request: one of them.
            used: fraction that the server reports; None where it does not tell.
        """
        allowed = (request.keep,) if request.keep is not None else self._chosen
        if used is None:
            used = request.keep if request.keep is not None else self._keep
        if used not in allowed:
            return ()
        return self._answers[self._numbers[id(request)], used]


def learn(bundle: Path, requests: Sequence[Request], chosen: Sequence[float] = ()) -> Known:
    """Ask everything, one after the other, without a server.

    Args:
        bundle: its folder.
        requests: all of them.
        chosen: fractions that the server may choose for requests that choose none.
    """
    answers: Answers = {}
    with load(bundle, threads=1) as model:
        own = model.bundle.manifest.pruning.keep
        for number, request in enumerate(requests):
            for keep in (request.keep,) if request.keep is not None else tuple(chosen) or (own,):
                answers[number, keep] = alone(model, request, keep)
    return Known(requests, answers, own, chosen)
