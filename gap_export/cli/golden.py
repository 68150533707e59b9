"""`gap-export golden`: the golden request of a bundle that was built without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export.cli.app import out, print_json
from gap_export.cli.options import BundleArgument, JsonOption
from gap_export.cli.progress import progress_shown


def golden(
    bundle: BundleArgument,
    replace: Annotated[bool, typer.Option(help="Make it anew where the bundle has one.")] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Where the weights lie; by default where the bundle was built from."),
    ] = None,
    text_tower: Annotated[
        Path | None,
        typer.Option(help="Where those of the text tower lie; by default where the bundle was built from."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Store a golden request in a bundle, which `serve` needs: PyTorch answers a scene with right and with wrong position ids.

    For bundles that were built where PyTorch did not fit into memory. The manifest is written anew: reports that were taken before are of another one.
    """
    from gap_export.environment import check_build_extra

    check_build_extra("gap-export golden")
    from gap_export.pipeline.golden import add_golden, in_words

    with progress_shown() as progress:
        made = add_golden(
            bundle, replace=replace, checkpoint=checkpoint, text_tower=text_tower, progress=progress
        )
    stored = made.golden
    assert stored is not None
    if as_json:
        print_json({"bundle": str(bundle), "golden": stored.model_dump(mode="json")})
    else:
        out.say((f"{bundle}", "bold green"), f": {in_words(stored)}")
        out.say(
            f"  {stored.expression!r}: {stored.right.box} with the right ids, {stored.wrong.box} with wrong ones"
        )
