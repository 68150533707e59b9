"""What does choosing visual tokens cost at the published sizes, as a share of the vision graph's time? See README.md for the protocol.

    python bench/selection_cost.py [--rounds N] [--models NAMES] [--pruners NAMES] [--scratch FOLDER] [--label TEXT]

Towers of published widths and random weights, fp32, one thread of ONNX Runtime: 576 visual tokens of LLaVA-1.5, 1280 of Qwen2.5-VL, 2880 of
LLaVA-NeXT (five tiles), a quarter kept. What a pruner takes does not depend on how many layers lie before it, so it is measured behind few of them:
the vision graph of a shallow tower with the pruner, and with `random`, which looks at nothing, in turns; the difference is the pruner's. It is divided by
the time of the whole vision graph, every layer of it, with `random`. The costliest pruner of each model is also measured in the whole graph: the
difference of two whole graphs must be what the shallow ones say. Times are processor time, which other work on the machine adds less to. The last
line printed is the record, also stored in bench/results/.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
import numpy as np
import pruners
from PIL import Image
from rich.console import Console
from rich.table import Table

from gap_export import prune
from gap_export.checkpoint import random_weights
from gap_export.checkpoint.random_weights import Published, published, write_checkpoint
from gap_export.recipe.recipe import load_recipe

MOST_OF_VISION = pruners.MOST_OF_VISION
"""A pruner may add this share of the vision graph's time."""
KEEP = 0.25
MOST_APART = 0.03
"""Share of the whole graph's time by which what is found behind few layers may lie beside what rounds of the whole graph say."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model at one size.

    Attributes:
        recipe: by name.
        tokens: visual tokens among which is chosen.
        image: size in pixels of the image that has as many.
        tower: for people.
        shallow: the tower's part of the configuration -> the same with few layers.
        whole_rounds: runs of each whole vision graph.
        warm_up: runs of it before those, which are not counted; none where one takes more than a minute.
    """

    recipe: str
    tokens: int
    image: tuple[int, int]
    tower: str
    shallow: Callable[[Json], Json]
    whole_rounds: int
    warm_up: int = 1


def few_of_clip(tower: Json) -> Json:
    """Two layers whose output the decoder gets, and the one behind them, in which `prumerge` looks at queries and keys."""
    return {**tower, "num_hidden_layers": 3}


def few_of_qwen25(tower: Json) -> Json:
    """A layer that attends within windows, and one that attends to all, in which attention received is computed."""
    return {**tower, "depth": 2, "fullatt_block_indexes": [1]}


CASES = (
    Case("llava", 576, (336, 336), "CLIP ViT-L/14 at 336 pixels, 24 layers", few_of_clip, 7),
    Case(
        "qwen2.5-vl", 1280, (1120, 896), "Qwen2.5-VL's, 32 layers, 5120 patches", few_of_qwen25, 2, warm_up=0
    ),
    Case(
        "llava-next", 2880, (672, 672), "CLIP ViT-L/14 at 336 pixels, 24 layers, five tiles", few_of_clip, 3
    ),
)


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each shallow vision graph")
    parser.add_argument("--models", default="all", help="recipes, with commas between them")
    parser.add_argument("--pruners", default="all", help="names, with commas between them")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    console = Console(stderr=True)
    measurable = [name for name in prune.names(in_decoder=False) if name not in ("none", "random")]
    names = measurable if options.pruners == "all" else options.pruners.split(",")
    cases = [case for case in CASES if options.models == "all" or case.recipe in options.models.split(",")]
    if not cases:
        raise SystemExit(f"--models {options.models}: choose of {', '.join(case.recipe for case in CASES)}")
    options.scratch.mkdir(parents=True, exist_ok=True)
    whole = names == measurable
    found = stored() if whole else {}
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="selection-", dir=options.scratch) as folder:
            bench = Bench(case, options.scratch, Path(folder), console)
            found[case.recipe] = {**measured(bench, names, options.rounds), "machine": harness.machine()}
        show(found[case.recipe])
        # After each model: a run that is ended leaves what was done.
        code = harness.finish(
            "selection_cost",
            {"limit": MOST_OF_VISION, "keep": KEEP, "threads": 1, "models": in_order(found)},
            label=options.label,
            ok=all(model["ok"] for model in found.values()),
            store=whole,
        )
    return code


def stored() -> dict[str, Json]:
    """Recipe -> what an earlier run found of it; a run replaces the models that it measures."""
    record = harness.RESULTS / "selection_cost.json"
    content = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"models": []}
    return {model["recipe"]: model for model in content["models"]}


def in_order(found: dict[str, Json]) -> list[Json]:
    """By the number of tokens."""
    return sorted(found.values(), key=lambda model: int(model["tokens"]))


class Bench:
    """Vision graphs of one model.

    Args:
        case: the model.
        scratch: for checkpoints, which the next run finds again.
        folder: for graphs.
        console: told how far it is.
    """

    def __init__(self, case: Case, scratch: Path, folder: Path, console: Console) -> None:
        from gap_export.graph.trace_cache import Tracer

        self.case, self.console = case, console
        self._folder, self._tracer = folder, Tracer(None)
        recipe = load_recipe(case.recipe)
        original = published(recipe.checkpoint)
        text = original.config.get("text_config")
        self._text_tower = None
        if recipe.text_tower is not None or case.shallow is few_of_clip:
            self._text_tower = pruners.ensure_text_tower(scratch / "clip-l-text")
        whole = {**original.config, "num_hidden_layers": 1}
        if text is not None:
            whole = {**original.config, "text_config": {**text, "num_hidden_layers": 1}}
        shallow = {**whole, "vision_config": case.shallow(whole["vision_config"])}
        self._checkpoints = {}
        for depth, config in (("whole", whole), ("shallow", shallow)):
            target = scratch / checkpoint_name(case, depth, replace(original, config=config))
            if not target.exists():
                console.print(f"{case.recipe}: writing {target.name}")
                write_checkpoint(target, replace(original, config=config))
            self._checkpoints[depth] = target

    def graph(self, pruner: str, depth: str) -> Callable[[], float]:
        """The vision graph with a pruner: a function that runs it and says how long that took."""
        from gap_export.pipeline.graphs import trace_graphs, write_graphs
        from gap_export.pipeline.opened import open_model
        from gap_export.plan import plan_for

        recipe = load_recipe(self.case.recipe).replaced(
            checkpoint=str(self._checkpoints[depth]),
            pruner=pruner,
            keep=KEEP,
            precision="fp32",
            text_tower=str(self._text_tower) if prune.row(pruner).needs_text and self._text_tower else None,
        )
        model = open_model(recipe)
        plan = plan_for(recipe, model.spec, model.text_tower)
        folder = self._folder / f"{depth}-{pruner}"
        folder.mkdir()
        traced = trace_graphs(model, plan, only={"vision"}, tracer=self._tracer)
        graph = write_graphs(traced, model, plan, folder).graphs["vision"]
        session = pruners.session(folder / graph.file)
        # Weights are in memory now, and every graph has converted ones of its own.
        shutil.rmtree(folder)
        noise = np.random.default_rng(1).integers(0, 256, (*self.case.image[::-1], 3), np.uint8)
        batch = model.layout.prepare([Image.fromarray(noise)], visual_tokens=model.spec.visual_tokens)
        prunable = int(batch.prunable[0])
        if prunable != self.case.tokens:
            raise SystemExit(
                f"{self.case.recipe}: {prunable} tokens, and {self.case.tokens} are to be measured"
            )
        given = {
            **batch.calls[0],
            "text_ids": np.array([[0, *range(5, 3 + pruners.TEXT_IDS), 1]]),
            "keep_count": np.array(prune.share_of(KEEP, prunable, prune.row(pruner).min_tokens)),
        }
        feeds = {value.name: given[value.name] for value in session.get_inputs()}
        nodes = sum(graph.operators.values())
        self.console.print(f"{self.case.recipe}, {pruner}, {depth}: {nodes} nodes", highlight=False)

        def run() -> float:
            began = time.process_time()
            session.run(None, feeds)
            return time.process_time() - began

        return run


def checkpoint_name(case: Case, depth: str, content: Published) -> str:
    """Of the folder: with a hash of all that is written there."""
    whole = json.dumps([asdict(content), Path(random_weights.__file__).read_text(encoding="utf-8")])
    return f"selection-{case.recipe}-{depth}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"


def measured(bench: Bench, names: Sequence[str], rounds: int) -> Json:
    """What each pruner takes, behind few layers, as a share of all of them; and the costliest in the whole graph."""
    baseline = bench.graph("random", "shallow")
    added: dict[str, list[float]] = {}
    for name in names:
        graph = bench.graph(name, "shallow")
        times = in_turns((graph, baseline), rounds)
        added[name] = [own - other for own, other in times]
        bench.console.print(
            f"    {np.median(added[name]):.2f} s more than {np.median([other for _, other in times]):.2f} s",
            highlight=False,
        )
        del graph
    costliest = max(added, key=lambda name: float(np.median(added[name])))
    whole, own = (bench.graph(name, "whole") for name in ("random", costliest))
    pairs = in_turns((own, whole), bench.case.whole_rounds, bench.case.warm_up)
    return {
        "recipe": bench.case.recipe,
        "tower": bench.case.tower,
        "tokens": bench.case.tokens,
        **shares(added, costliest, pairs),
    }


def in_turns(graphs: Sequence[Callable[[], float]], rounds: int, warm_up: int = 1) -> list[tuple[float, ...]]:
    """Times of graphs that run one after the other, the rounds that warm up left out."""
    return [tuple(graph() for graph in graphs) for _ in range(warm_up + rounds)][warm_up:]


def shares(added: dict[str, list[float]], checked: str, pairs: Sequence[tuple[float, ...]]) -> Json:
    """Of the whole vision graph's time.

    Args:
        added: pruner -> seconds that it takes, of every round.
        checked: the pruner that was also measured in the whole graph.
        pairs: (seconds of the whole graph with that pruner, with `random`) of every round.
    """
    whole = float(np.median([other for _, other in pairs]))
    rows = {
        name: {
            "seconds": round(float(np.median(seconds)), 4),
            "share": round(float(np.median(seconds)) / whole, 4),
            "smallest": round(min(seconds) / whole, 4),
            "largest": round(max(seconds) / whole, 4),
        }
        for name, seconds in added.items()
    }
    direct, behind_few = [own / other - 1 for own, other in pairs], rows[checked]["share"]
    same = min(direct) - MOST_APART <= behind_few <= max(direct) + MOST_APART
    return {
        "whole_seconds": [round(other, 2) for _, other in pairs],
        "pruners": rows,
        "checked": {
            "pruner": checked,
            "in_the_whole_graph": round(float(np.median(direct)), 4),
            "smallest": round(min(direct), 4),
            "largest": round(max(direct), 4),
            "behind_few_layers": behind_few,
            "same": same,
        },
        "above_the_limit": [name for name, row in rows.items() if row["share"] > MOST_OF_VISION],
        "ok": same and all(row["share"] <= MOST_OF_VISION for row in rows.values()),
    }


def show(model: Json) -> None:
    """For people."""
    table = Table(
        "pruner", "seconds", "share", "smallest", "largest",
        title=f"{model['recipe']}, {model['tokens']} tokens; the whole graph takes {np.median(model['whole_seconds']):.1f} s",
    )  # fmt: skip
    for name, row in model["pruners"].items():
        percent = (f"{100 * row[key]:.1f} %" for key in ("share", "smallest", "largest"))
        table.add_row(name, f"{row['seconds']:.2f}", *percent)
    console = Console()
    console.print(table)
    checked = model["checked"]
    console.print(
        f"{checked['pruner']} in the whole graph: {100 * checked['in_the_whole_graph']:.1f} % "
        f"({100 * checked['smallest']:.1f} to {100 * checked['largest']:.1f}), "
        f"behind few layers {100 * checked['behind_few_layers']:.1f} %",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
