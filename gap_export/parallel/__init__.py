"""Tasks dispatched to processes of this machine, or to a Ray cluster; results as they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from gap_export.parallel.local import results_of
from gap_export.parallel.ray import Cluster, results_on
from gap_export.parallel.worker import Result, Task, Worker
from gap_export.progress import SILENT, Progress


def dispatch(
    make_worker: Callable[[], Worker[Task, Result]],
    tasks: Sequence[Task],
    *,
    workers: int = 1,
    cluster: Cluster | None = None,
    name_of: Callable[[Task], str],
    progress: Progress = SILENT,
) -> Generator[Result]:
    """Do all tasks.

    Args:
        make_worker: called once in every process, when there is a task for it; can be pickled, as can tasks and results.
        tasks: begun in this order.
        workers: processes of this machine; one is this process itself.
        cluster: to work on instead.
        name_of: a task, for messages; different for each.
        progress: told how far all workers together are.

    Returns:
        Results in the order in which they are finished. A caller that stops early closes the generator, which ends the workers.

    Raises:
        GapExportError: a worker's own.
        MissingRequirementError: workers cannot be started, or break down.
    """
    if cluster is None:
        return results_of(make_worker, tasks, workers=workers, progress=progress)
    return results_on(cluster, make_worker, tasks, name_of=name_of, progress=progress)
