"""The commands, what `gap-export` prints about errors, and its exit codes.

0: fine. 1: a gate was not met. 2: the user can do something about it (message and hint, no traceback). Anything that shows
a traceback is a bug. Heavy imports happen inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any, NoReturn, TextIO

import typer

from gap_export import __version__
from gap_export.cli import (
    bench,
    build,
    calibrate,
    compare,
    evaluate,
    inspect,
    lint,
    models,
    recommend,
    report,
    run,
    sweep,
    validate,
)
from gap_export.cli.app import app, console, out
from gap_export.errors import CheckpointWarning, GapExportError
from gap_export.terminal import one_line

__all__ = ["__version__", "app", "main"]

_NAMES = {"evaluate": "eval"}
"""Commands whose name is taken by Python."""

# In the order in which they are needed, which is that of the help.
for command in (
    models.models,
    build.build,
    calibrate.calibrate,
    validate.validate,
    run.run,
    bench.bench,
    sweep.sweep,
    evaluate.evaluate,
    compare.compare,
    recommend.recommend,
    report.report,
    inspect.inspect,
    lint.lint,
):
    app.command(_NAMES.get(command.__name__))(command)

_INTERRUPTED = 130
"""Exit code of Ctrl-C, as shells have it."""


def main() -> NoReturn:
    """Entry point: run a command, turn a `GapExportError` into a message and exit code 2."""
    _print_anything()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = _run()
    sys.exit(code)


def _run() -> int:
    """Exit code of the command that was asked for."""
    try:
        # Outside standalone mode, typer gives the code of a raised Exit back, and for Ctrl-C the shell's.
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except GapExportError as error:
        return _report(error.stage, error.subject, error.message, error.hint)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.say(("interrupted", "yellow"), ": no partial output was left; rerun the same command")
        return _INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # a click usage error knows how to show itself
            raise
        return _usage(error)
    return code


def _usage(error: Any) -> int:
    """A command line that cannot be parsed; without a message, help was printed already: that is the name alone."""
    message = error.format_message()
    if not message:
        return 2
    context = getattr(error, "ctx", None)
    told = "gap-export" if context is None or context.parent is None else f"gap-export {context.info_name}"
    return _report("usage", "command line", message, f"see {told} --help")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours as a sentence; those of libraries as Python shows them."""
    if issubclass(category, CheckpointWarning):
        console.say(("warning:", "yellow"), f" {message}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _print_anything() -> None:
    """Escape what standard output cannot show: names of files and texts of data sets are in any encoding, and the work is done."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # what stands in for it may have none
    if reconfigure is not None and sys.stdout.errors == "strict":
        reconfigure(errors="backslashreplace")


def _report(stage: str, subject: str, message: str, hint: str) -> int:
    console.say((stage, "bold red"), f": {one_line(subject)}: {one_line(message)}")
    console.say("  ", ("hint", "cyan"), f": {one_line(hint)}")
    return 2


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
