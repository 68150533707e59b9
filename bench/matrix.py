"""Which pruner works on which recipe? Every cell of the table is built and asked; see README.md for the protocol.

    python bench/matrix.py [--only FAMILY[,PRUNER]] [--fresh] [--scratch FOLDER] [--label TEXT]

Cells are those of the tables: every recipe of a published model, every pruner that prunes. Where the table of families says that a pruner works,
a bundle of a small checkpoint in the published layout answers one expression in ONNX Runtime and in PyTorch; both must keep the same tokens and
say the same. Where it says that one does not, `gap-export build` must refuse, and the reason is what the command prints. Each cell becomes a line of
a file in the scratch folder as soon as it is done: rerun the same command to resume. Cells that did not end as the table says, and those of other
sources of the package, are done again. The last line printed is the record, also stored in bench/results/ where no cell was left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import harness
import numpy as np
import small_checkpoints
from PIL import Image
from rich.console import Console

import gap_export as gap
from gap_export import families, prune
from gap_export.errors import GapExportError, RecipeError
from gap_export.recipe.recipe import Recipe, known_recipes, load_recipe

BUNDLED = "bundled:"
"""How the checkpoints of recipes begin that are of no published model."""
NEW_TOKENS = 8
TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit."""
IMAGE = (100, 70)
"""Size of the image, in pixels."""


@dataclass(frozen=True)
class Cell:
    """A recipe and a pruner.

    Attributes:
        recipe: its name.
        family: of the recipe.
        pruner: its name.
        lacks: what the pruner needs and the family does not have, by the table; "" where the table says that it works.
    """

    recipe: str
    family: str
    pruner: str
    lacks: str


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        result: `works`, `refused` or `failed`.
        reason: why it was refused, as the command says it, or what failed.
        tokens: visual tokens of the image, and how many of them were left.
        seconds: that it took.
    """

    result: str
    reason: str = ""
    tokens: tuple[int, int] | None = None
    seconds: float = 0.0


Done = dict[Cell, Outcome]


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--only", default="", help="a family or a recipe; behind a comma, a pruner")
    parser.add_argument("--fresh", action="store_true", help="do all cells again")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    console = Console(stderr=True)
    whole = list(cells())
    wanted = list(only(whole, options.only))
    folder = options.scratch / "matrix"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "cells.jsonl"
    if options.fresh:
        log.unlink(missing_ok=True)
    done = {cell: outcome for cell, outcome in read(log).items() if cell in wanted and agrees(cell, outcome)}
    if done:
        console.print(f"{len(done)} of {len(wanted)} cells were done before")
    for number, cell in enumerate(wanted, 1):
        if cell not in done:
            done[cell] = tried(cell, folder)
            append(log, cell, done[cell])
            outcome = done[cell]
            said = "" if agrees(cell, outcome) else ", against the table"
            console.print(
                f"{number}/{len(wanted)} {cell.recipe}, {cell.pruner}: {outcome.result}{said} ({outcome.seconds:.0f} s)",
                highlight=False,
            )
    found = summary({cell: done[cell] for cell in wanted})
    show(found)
    return harness.finish(
        "matrix",
        found,
        label=options.label,
        ok=not found["against_the_table"],
        store=wanted == whole,
    )


def cells() -> Iterator[Cell]:
    """Every recipe of a published model, every pruner but `none`, and what the table says of them."""
    for name in sorted(known_recipes()):
        recipe = load_recipe(name)
        if recipe.checkpoint.startswith(BUNDLED):
            continue
        assert recipe.family is not None
        row = families.row(recipe.family)
        for pruner in prune.PRUNERS.values():
            if pruner.name != "none":
                yield Cell(name, row.name, pruner.name, row.lacks(pruner))


def only(every: Iterable[Cell], text: str) -> Iterator[Cell]:
    """Those that `--only` names.

    Raises:
        SystemExit: there is none.
    """
    of, _, pruner = text.partition(",")
    found = [cell for cell in every if of in ("", cell.family, cell.recipe) and pruner in ("", cell.pruner)]
    if not found:
        raise SystemExit(f"--only {text}: there is no such cell")
    yield from found


def agrees(cell: Cell, outcome: Outcome) -> bool:
    """Whether a cell ended as the table says."""
    return outcome.result == ("refused" if cell.lacks else "works")


# A cell


def tried(cell: Cell, folder: Path) -> Outcome:
    """Build a cell and ask it, or see that it is refused."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cell-", dir=folder) as scratch:
        try:
            recipe = small_recipe(cell, folder)
            outcome = (by_command if cell.lacks else asked)(recipe, Path(scratch))
        except Exception as error:  # whatever it is, the other cells are still to be done
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
    return Outcome(outcome.result, outcome.reason, outcome.tokens, round(time.perf_counter() - began, 1))


def small_recipe(cell: Cell, folder: Path) -> Recipe:
    """The recipe as it is, of a small checkpoint, in fp32."""
    recipe = load_recipe(cell.recipe)
    beside = small_checkpoints.ensure(recipe, folder / "checkpoints" / cell.recipe)
    changed = {"pruner": cell.pruner, "precision": "fp32", "max_new_tokens": NEW_TOKENS, **beside}
    # The bound on pixels is that of the small checkpoint.
    return Recipe.model_validate({**recipe.model_dump(), **changed, "max_pixels": None})


def by_command(recipe: Recipe, scratch: Path) -> Outcome:
    """What `gap-export build` says of a recipe that it is to refuse."""
    file, out = scratch / f"{recipe.name}.yaml", scratch / "bundle"
    content = recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True, exclude={"name"})
    file.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    command = [
        sys.executable,
        "-m",
        "gap_export",
        "build",
        "--model",
        str(file),
        "--no-golden",
        "-o",
        str(out),
    ]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == 0:
        return Outcome("works", "the command builds it")
    if child.returncode != 2 or out.exists():
        return Outcome("failed", f"exit code {child.returncode}: {child.stderr.strip()[-500:]}")
    reason = reason_in(child.stderr, recipe.pruner)
    return Outcome("refused", reason) if reason else Outcome("failed", child.stderr.strip()[-500:])


def reason_in(message: str, pruner: str) -> str:
    """The line of a message that says what a recipe's pruner cannot do; "" where it says something else."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    begin = f"{RecipeError.stage}: pruner {pruner}"
    return next((line for line in lines if line.startswith((f"{begin}:", f"{begin},"))), "")


def asked(recipe: Recipe, scratch: Path) -> Outcome:
    """Build, answer in both, compare."""
    from gap_export.pipeline.build import build

    try:
        bundle = build(recipe, scratch / "bundle", golden=False, tracer=tracer()).bundle
    except RecipeError as error:
        return Outcome("refused", f"{error.stage}: {error.subject}: {error.message}")
    except GapExportError as error:
        return Outcome("failed", f"{error.stage}: {error.subject}: {error.message}")
    exported, reference = (answer(bundle, backend) for backend in ("onnxruntime", "torch"))
    fault = difference(exported, reference)
    if fault:
        return Outcome("failed", fault)
    (kept,), (grounded,) = exported.generation.kept_of_last, exported.answers
    tokens = grounded.visual_tokens, len(kept)
    if tokens[1] >= tokens[0]:
        return Outcome("failed", f"keeps {tokens[1]} of {tokens[0]} tokens: nothing is pruned", tokens)
    return Outcome("works", tokens=tokens)


@cache
def tracer() -> Any:
    """Of all bundles: graphs that pruners before the decoder have in common are traced once."""
    from gap_export.graph.trace_cache import Tracer

    return Tracer(None, remembered=64)


def answer(bundle: Any, backend: str) -> Any:
    """One expression about one image, and what the answer was made from."""
    with gap.load(bundle, backend=backend, threads=1) as model:
        return model.grounder.ground(
            model.session, [image()], [small_checkpoints.EXPRESSION], keep_logits=True
        )


@cache
def image() -> Image.Image:
    """Noise: every patch is another."""
    width, height = IMAGE
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def difference(exported: Any, reference: Any) -> str:
    """What is not the same in two answers of one expression; "" where all is."""
    one, other = exported.generation, reference.generation
    for mine, theirs in zip(one.every_kept_indices, other.every_kept_indices, strict=True):
        if not np.array_equal(mine, theirs):
            return f"keeps {mine.tolist()}, PyTorch {theirs.tolist()}"
    if one.tokens != other.tokens:
        return f"answers {one.tokens}, PyTorch {other.tokens}"
    off = max(
        float(np.abs(mine - theirs).max() / np.abs(theirs).max())
        for mine, theirs in zip(one.logits, other.logits, strict=True)
    )
    return "" if off <= TOLERANCE else f"logits differ by {off:.1e} of the largest"


# Resuming


@cache
def sources(recipe: str) -> str:
    """What an outcome depends on: every source of the package, the recipe, and the scripts that make a cell."""
    scripts = (Path(__file__), *small_checkpoints.sources())
    files = [*Path(gap.__file__).parent.rglob("*.py"), known_recipes()[recipe], *scripts]
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def append(log: Path, cell: Cell, outcome: Outcome) -> None:
    """One line more."""
    line = {"sources": sources(cell.recipe), "cell": asdict(cell), "outcome": asdict(outcome)}
    with log.open("ab+") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            if out.read() != b"\n":
                out.write(b"\n")  # the line before was cut off, and is not to take this one with it
        out.write(json.dumps(line).encode() + b"\n")


def read(log: Path) -> Done:
    """What was done before with the same sources; a line that was cut off counts as not written."""
    done: Done = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []:
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        cell = Cell(**content["cell"])
        if cell.recipe in known_recipes() and content["sources"] == sources(cell.recipe):
            outcome = content["outcome"]
            tokens = outcome["tokens"] and tuple(outcome["tokens"])
            done[cell] = Outcome(**{**outcome, "tokens": tokens})
    return done


# What is said at the end


def summary(done: Done) -> dict[str, Any]:
    """Counts, the cells that were refused by reason, and those that ended otherwise than the table says."""
    counts = Counter(outcome.result for outcome in done.values())
    refused: dict[str, dict[str, Any]] = {}
    for cell, outcome in done.items():
        if outcome.result == "refused":
            entry = refused.setdefault(outcome.reason, {"table": cell.lacks, "cells": []})
            entry["cells"].append([cell.recipe, cell.pruner])
    return {
        "cells": len(done),
        "recipes": len({cell.recipe for cell in done}),
        "pruners": len({cell.pruner for cell in done}),
        **{result: counts[result] for result in ("works", "refused", "failed")},
        "seconds": round(sum(outcome.seconds for outcome in done.values())),
        "refused_by_reason": refused,
        "against_the_table": [
            {**asdict(cell), **asdict(outcome)} for cell, outcome in done.items() if not agrees(cell, outcome)
        ],
        "matrix": {
            recipe: {cell.pruner: outcome.result for cell, outcome in done.items() if cell.recipe == recipe}
            for recipe in dict.fromkeys(cell.recipe for cell in done)
        },
    }


def show(found: dict[str, Any]) -> None:
    """For people."""
    print(
        f"works: {found['works']} of {found['cells']}; refused {found['refused']}, failed {found['failed']}"
    )
    for reason, entry in found["refused_by_reason"].items():
        print(
            f"refused, as the table says (needs {entry['table']}): {reason}"
            if entry["table"]
            else f"refused: {reason}"
        )
        for recipe, pruner in entry["cells"]:
            print(f"    {recipe}, {pruner}")
    for entry in found["against_the_table"]:
        says = f"needs {entry['lacks']}" if entry["lacks"] else "works"
        print(
            f"AGAINST THE TABLE: {entry['recipe']}, {entry['pruner']}: {entry['result']}, the table says: {says}; {entry['reason']}"
        )


if __name__ == "__main__":
    sys.exit(main())
