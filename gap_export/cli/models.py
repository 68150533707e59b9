"""`gap-export models`: what can be built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Column, Table

from gap_export.cli.app import out, plain, print_json
from gap_export.cli.options import JsonOption

if TYPE_CHECKING:
    from gap_export.boxes.codecs import BoxCodec


def models(as_json: JsonOption = False) -> None:
    """Recipes, families, and what each needs."""
    from dataclasses import asdict

    from gap_export import families, prune
    from gap_export.boxes.codecs import CODECS
    from gap_export.recipe import recipe

    recipes = [recipe.load_recipe(name) for name in recipe.known_recipes()]
    known = {r.name: families.row(r.family) for r in recipes if r.family in families.names()}
    needed = {
        r.name: {
            part: getattr(r, part) for part in ("base", "vision_tower", "text_tower") if getattr(r, part)
        }
        for r in recipes
    }
    boxes = {name: _boxes(CODECS[each.box.codec], each.box.frame) for name, each in known.items()}
    if as_json:
        print_json(
            {
                "recipes": [
                    {
                        "name": r.name,
                        "family": r.family,
                        "box_format": known[r.name].box.model_dump(),
                        "pruners": list(known[r.name].pruners),
                        "checkpoint": r.checkpoint,
                        "needs": needed[r.name],
                        "summary": r.summary,
                    }
                    for r in recipes
                ],
                "pruners": [asdict(row) for row in prune.PRUNERS.values()],
            }
        )
        return
    table = Table(
        "recipe",
        "family",
        Column("boxes", overflow="fold"),
        Column("checkpoint, and what lies beside it", overflow="fold"),
        "pruners that do not work",
    )
    for r in recipes:
        checkpoints = [r.checkpoint, *(f"{part}: {given}" for part, given in needed[r.name].items())]
        not_working = [name for name in prune.names() if name not in known[r.name].pruners]
        table.add_row(
            r.name, r.family, plain(boxes[r.name]), "\n".join(checkpoints), ", ".join(not_working) or "-"
        )
    out.print(table)
    pruners = Table("pruner", "keeps", "needs", "prunes", "merges")
    for row in prune.PRUNERS.values():
        pruners.add_row(row.name, row.summary, prune.needs(row), prune.where(row), prune.merging(row))
    out.print(pruners)


def _boxes(codec: BoxCodec, frame: str) -> str:
    """How a box is written, and of what."""
    if codec.unit is None:
        return f"{codec.example} in pixels of the {frame} as scaled, here to 640x480"
    return f"{codec.example} of the {frame.replace('_', ' ')}"
