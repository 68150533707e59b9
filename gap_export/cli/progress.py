"""How far a command is, on the terminal: the one implementation of `gap_export.progress.Progress` that shows something."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gap_export.cli.app import console
from gap_export.terminal import one_line

if TYPE_CHECKING:
    from rich.progress import Progress, Task


@contextmanager
def progress_shown() -> Iterator[Bar]:
    """Show the stage, and, where the amount of work is known, a bar and the time left; all of it is gone at the end.

    Ctrl-C ends what runs inside, even where a library catches it and continues: then at the next report of progress.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
    )
    silent = not console.is_terminal  # a display that shows nothing would still end with an empty line
    with (
        _interruptible() as interrupted,
        Progress(*columns, console=console, transient=True, disable=silent) as shown,
    ):
        yield Bar(shown, interrupted)


class Bar:
    """One line on the terminal.

    Args:
        shown: the display that it becomes a line of.
        interrupted: has an element once Ctrl-C was pressed.
    """

    def __init__(self, shown: Progress, interrupted: list[bool]) -> None:
        self._shown, self._interrupted = shown, interrupted
        self._line = shown.add_task("starting ...", total=None, amount="")

    def stage(self, message: str, total: int | None = None) -> None:
        """A stage begins; see `gap_export.progress.Progress`.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        self._raise_if_interrupted()
        if total is not None:
            self._shown.reset(self._line, total=total)
        self._shown.update(self._line, description=f"{one_line(message)} ...")
        self._show_amount()

    def advance(self, count: int = 1) -> None:
        """Units of work were finished.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        self._raise_if_interrupted()
        self._shown.advance(self._line, count)
        self._show_amount()

    def time_left(self) -> str:
        """From the mean over the whole time: stages differ, and the pace of the moment says nothing."""
        task = self._task
        if not task.completed or task.total is None:
            return "time left unknown"
        seconds = (task.elapsed or 0.0) * (task.total - task.completed) / task.completed
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

    @property
    def _task(self) -> Task:
        return self._shown.tasks[0]

    def _show_amount(self) -> None:
        task = self._task
        if task.total is not None:
            amount = f"{task.completed:.0f}/{task.total:.0f}, {self.time_left()}"
            self._shown.update(self._line, amount=amount)

    def _raise_if_interrupted(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    interrupted: list[bool] = []

    def interrupt(*_: Any) -> None:
        interrupted.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
