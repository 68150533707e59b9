"""`gap-export inspect`: what is inside a bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from gap_export.cli.app import out, print_json
from gap_export.cli.options import BundleArgument, JsonOption


def inspect(
    bundle: BundleArgument,
    verify: Annotated[bool, typer.Option(help="Check the hashes of large files too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What is inside a bundle: ids, slots, ops, engines, sizes."""
    from gap_export.evaluation.report.terminal import bundle_facts, print_bundle

    facts = bundle_facts(bundle, every_hash=verify)
    if as_json:
        print_json(facts)
    else:
        print_bundle(facts, out)
