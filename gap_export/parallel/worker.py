"""What a worker is, in a process of this machine or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

from gap_export.progress import Progress

Task = TypeVar("Task", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Worker(Protocol[Task, Result]):
    """Does one task after the other, and may keep what they have in common."""

    def __call__(self, task: Task, progress: Progress, /) -> Iterator[Result]:
        """Results of one task, each as soon as it is finished.

        Args:
            task: what to do.
            progress: told how far the work is.

        Raises:
            GapExportError: the task cannot be done; the caller gets this error.
        """
        ...
