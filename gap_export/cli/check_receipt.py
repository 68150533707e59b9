"""`gap-export check-receipt`: whether an answer is what a bundle makes of an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gap_export.cli.app import out, print_json
from gap_export.cli.options import BundleArgument, JsonOption, ThreadsOption

if TYPE_CHECKING:
    from gap_export.serving.check_receipt import ReceiptCheck

_MARKS = {True: ("agrees", "green"), False: ("differs", "bold red"), None: ("not told", "yellow")}


def check_receipt(
    bundle: BundleArgument,
    receipt: Annotated[
        Path, typer.Argument(help="JSON file of the `receipt` of an answer, as the server sent it.")
    ],
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image that was asked about; all of them, in their order.")
    ] = None,
    refer: Annotated[
        str | None, typer.Option(help="Expression that was asked; by default the one in the receipt.")
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON file of the `messages` of a conversation, or of the whole body that was sent; its images are the IMAGE arguments.",
        ),
    ] = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compute a server's answer again, and hold every part of its receipt against it. Exit 1 when something differs or could not be checked."""
    import gap_export as gap

    check = gap.check_receipt(bundle, receipt, [*(images or ())], refer, messages=messages, threads=threads)
    if as_json:
        lines = [{"name": line.name, "agrees": line.agrees, "said": line.said} for line in check.lines]
        print_json({"agrees": check.agrees, "unchecked": check.unchecked, "lines": lines})
    else:
        _print(check)
    raise typer.Exit(0 if check.agrees else 1)


def _print(check: ReceiptCheck) -> None:
    for line in check.lines:
        word, style = _MARKS[line.agrees]
        out.say((f"{word:8}", style), f"  {line.name}: {line.said}")
    if check.agrees:
        out.say(("the receipt agrees", "bold green"), " with the bundle and the image")
    elif check.contradicted:
        out.say(("the receipt does not agree", "bold red"), f": {', '.join(check.contradicted)}")
    else:
        out.say(("the receipt could not be checked", "bold yellow"), f": {', '.join(check.unchecked)}")
