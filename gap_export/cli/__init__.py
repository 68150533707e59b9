"""The commands, what `gap-export` prints about errors, and its exit codes.

0: fine. 1: a gate was not met. 2: the user can do something about it (message and hint, no traceback). Anything that shows
a traceback is a bug. Heavy imports happen inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any, NoReturn, TextIO

import typer

from gap_export import __version__
from gap_export.cli import (
    ask,
    bench,
    build,
    calibrate,
    check_receipt,
    compare,
    evaluate,
    golden,
    inspect,
    lint,
    models,
    recommend,
    report,
    run,
    serve,
    streams,
    sweep,
    validate,
)
from gap_export.cli.app import app, console, out
from gap_export.errors import CheckpointWarning, GapExportError, OutputError, SessionWarning, was_interrupted
from gap_export.terminal import lost_output, one_line

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
    ask.ask,
    serve.serve,
    bench.bench,
    sweep.sweep,
    evaluate.evaluate,
    compare.compare,
    recommend.recommend,
    report.report,
    inspect.inspect,
    lint.lint,
    golden.golden,
    check_receipt.check_receipt,
):
    app.command(_NAMES.get(command.__name__))(command)

_INTERRUPTED = 130
"""Exit code of Ctrl-C, as shells have it."""


def main() -> NoReturn:
    """Entry point: run a command, turn a `GapExportError` into a message and exit code 2."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code, lost = streams.finish(_run())
    if lost is not None:
        _failed(lost_output(lost))
    sys.exit(code)


def _run() -> int:
    """Exit code of the command that was asked for."""
    try:
        streams.check_surroundings(sys.argv[1:])
        # Outside standalone mode, typer gives the code of a raised Exit back, and for Ctrl-C the shell's.
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except GapExportError as error:
        return _interrupted() if was_interrupted(error) else _failed(error)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except OSError as error:
        return _system(error)
    except MemoryError:
        return _report(
            "environment",
            "memory",
            "there is not enough for this",
            "choose a smaller model or --batch, or use a machine with more",
        )
    except Exception as error:
        if was_interrupted(error):
            return _interrupted()
        if not hasattr(error, "format_message"):  # a usage error knows how to show itself
            raise
        return _usage(error)
    return code


def _interrupted() -> int:
    console.say(("interrupted", "yellow"), ": no partial output was left; rerun the same command")
    return _INTERRUPTED


def _system(error: OSError) -> int:
    """What the system refused and nothing nearer has said: a stream, or a file whose name comes from outside."""
    if streams.is_lost_output(error):
        return _failed(lost_output(error))
    subject = " -> ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None)
    return _report(
        "system",
        subject or type(error).__name__,
        error.strerror or str(error),
        "check the path, its permissions and the space that is left",
    )


def _failed(error: GapExportError) -> int:
    if isinstance(error, OutputError):
        streams.discard(sys.stdout)  # or what it still holds would be written at the end, in vain
    return _report(error.stage, error.subject, error.message, error.hint)


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
    if issubclass(category, CheckpointWarning | SessionWarning):
        console.say(("warning:", "yellow"), f" {message}")
    else:
        console.print(
            warnings.formatwarning(message, category, filename, lineno, line), end="", soft_wrap=True
        )


def _report(stage: str, subject: str, message: str, hint: str) -> int:
    console.say((stage, "bold red"), f": {one_line(subject)}: {one_line(message)}")
    console.say("  ", ("hint", "cyan"), f": {one_line(hint)}")
    return 2


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
