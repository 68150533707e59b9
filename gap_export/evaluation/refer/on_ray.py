"""The same evaluation on a Ray cluster: images are dealt to workers, the caller alone keeps the journal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial

from gap_export.evaluation.refer.annotations import Expression
from gap_export.evaluation.refer.answering import Answerer
from gap_export.evaluation.refer.image_source import Source
from gap_export.evaluation.refer.journal import AnswerRow, Journal
from gap_export.evaluation.refer.run import Tick, Work, groups_left, rows_about
from gap_export.parallel.ray import Cluster, results_on

Group = tuple[Expression, ...]


def answer_on_ray(
    make_answerer: Callable[[], Answerer],
    work: Work,
    source: Source,
    journal: Journal,
    cluster: Cluster,
    *,
    tick: Tick = lambda count: None,
) -> None:
    """Answer what the journal does not hold yet.

    Args:
        make_answerer: called once in every worker; the bundle must be there under the same path.
        work: to be done.
        source: of images; sent to every worker.
        journal: kept here.
        cluster: where.
        tick: see `run.answer_all`.

    Raises:
        GapExportError: a worker's own, or see `cluster.results_on`.
    """
    groups = groups_left(work, journal, tick)
    worker = partial(_asking, make_answerer, source)
    with closing(results_on(cluster, worker, groups, name_of=lambda group: group[0].image)) as results:
        for rows in results:
            journal.add(rows)
            tick(len(rows))


def _asking(make_answerer: Callable[[], Answerer], source: Source) -> Callable[[Group], list[AnswerRow]]:
    return partial(rows_about, make_answerer(), source)
