"""`gap-export models`: what can be built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Column, Table

from gap_export.cli.app import out, print_json
from gap_export.cli.options import JsonOption

if TYPE_CHECKING:
    from gap_export.boxes.codecs import BoxCodec


def models(as_json: JsonOption = False) -> None:
    """Recipes, families, and what each needs."""
    from gap_export import prune
    from gap_export.boxes.codecs import CODECS
    from gap_export.families.table import overview

    record = overview()
    if as_json:
        print_json(record)
        return
    table = Table(
        "recipe",
        "family",
        Column("boxes", overflow="fold"),
        Column("checkpoint, and what lies beside it", overflow="fold"),
        "pruners that do not work",
    )
    for recipe in record["recipes"]:
        checkpoints = [
            recipe["checkpoint"],
            *(f"{part}: {given}" for part, given in recipe["needs"].items()),
        ]
        table.add_row(
            recipe["name"],
            recipe["family"],
            _boxes(CODECS[recipe["box_format"]["codec"]], recipe["box_format"]["frame"]),
            "\n".join(checkpoints),
            ", ".join(name for name in prune.names() if name not in recipe["pruners"]) or "-",
        )
    out.print(table)
    formats = Table("box format", Column("a box", overflow="fold"))
    for codec in CODECS.values():
        formats.add_row(codec.name, _boxes(codec, codec.frame))
    out.print(formats)
    pruners = Table("pruner", "keeps", "needs", "prunes", "merges")
    for row in prune.PRUNERS.values():
        pruners.add_row(row.name, row.summary, prune.needs(row), prune.where(row), prune.merging(row))
    out.print(pruners)


def _boxes(codec: BoxCodec, frame: str) -> str:
    """How a box is written, and of what."""
    if codec.unit is None:
        return f"{codec.example} in pixels of the {frame} as scaled, here to 640x480"
    return f"{codec.example} of the {frame.replace('_', ' ')}"
