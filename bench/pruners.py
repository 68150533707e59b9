"""Do exported pruners choose what float64 chooses, and what do they cost? See README.md for the protocol.

    python bench/pruners.py [--sets N] [--rounds N] [--pruners NAMES] [--scratch FOLDER] [--label TEXT] [--smoke]

First every pruner as a graph of its own on random feature sets of 576 and 256 tokens, width 1024, against the NumPy reference: a
graph with K as an input from the fewest tokens to all, a quarter of them on every set and other counts on a tenth; where an image
can find the count by itself, also so, with no bound below N. Then LLaVA-1.5's whole vision graph (24 layers, 336 pixels, random
weights) with each pruner that looks at the image, a quarter kept, against the same graph with `random`, which does not; the two
take turns. Pruners that read the expression bring CLIP's text tower with them, and what it costs is counted as theirs. The last
line printed is the record, also stored in bench/results/.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pruner_sets
from harness import LLAVA_7B, ensure_checkpoint, truncated
from pruner_sets import ALIGNED
from rich.console import Console
from rich.table import Table

from gap_export import prune

GRIDS = ((24, 24), (16, 16))
MOST_OF_VISION = 0.15
"""A pruner may add this share of the vision graph's time."""
MOST_TIES = {"vispruner": 0.4}
"""Share of sets in which float64 itself may choose by less than float32 can tell; a tenth where nothing else is said. VisPruner
sorts some 150 tokens in each of 54 rounds, and where a token lands decides which half it is in next: thousands of orders, of
which one in a million apart is common."""
TEXT_IDS = 16
"""Tokens of the expression that the vision graphs are timed with."""


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--sets", type=int, default=200, help="random feature sets per pruner and size")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each vision graph")
    parser.add_argument("--pruners", default="all", help="names, with commas between them")
    parser.add_argument("--smoke", action="store_true", help="5 sets, no vision graph, nothing stored")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    pruners = prune.names(in_decoder=False) if options.pruners == "all" else tuple(options.pruners.split(","))
    sets = 5 if options.smoke else options.sets
    console = Console()

    table = Table(
        "pruner", "tokens", "kept", "sets", "equal", "ties", "different", "graph alone, ms", "nodes"
    )
    agreement = []
    for row in [row for row in prune.PRUNERS.values() if row.name in pruners]:
        for grid in GRIDS:
            found = [
                *compared(row, grid, sets),
                *(compared_adaptive(row, grid, sets) if row.adaptive else []),
            ]
            agreement += found
            for one in found:
                table.add_row(*(str(value) for value in one.values()))
            console.print(
                f"{row.name}, {grid[0] * grid[1]} tokens: {sum(one['equal'] for one in found)} of "
                f"{sum(one['sets'] for one in found)} equal, {sum(one['ties'] for one in found)} ties"
            )
    console.print(table)
    ok = all(one["different"] == 0 for one in agreement)
    for name in pruners:
        ties, of = (sum(one[key] for one in agreement if one["pruner"] == name) for key in ("ties", "sets"))
        ok = ok and ties <= MOST_TIES.get(name, 0.1) * of

    cost: list[dict[str, Any]] = []
    if not options.smoke:
        looking = [
            row.name
            for row in prune.PRUNERS.values()
            if row.name in pruners and (row.needs or row.needs_text or row.reads_projected)
        ]
        cost = measured_in_vision(looking, options.rounds, options.scratch, console)
        ok = ok and all(row["added"] <= MOST_OF_VISION for row in cost)
    return harness.finish(
        "pruners",
        {"sets": sets, "agreement": agreement, "limit": MOST_OF_VISION, "cost": cost},
        label=options.label,
        ok=ok,
        store=not options.smoke,
    )


def compared(row: prune.Pruner, grid: tuple[int, int], sets: int) -> list[dict[str, Any]]:
    """One pruner on random sets of one size, at several counts."""
    tokens = grid[0] * grid[1]
    quarter = tokens // 4
    if row.name == "none":
        return [agreement_of(pruner_sets.graph(row.name, tokens, grid), None, sets)]
    graph = pruner_sets.graph(row.name, None, grid)
    counts = {
        row.min_tokens: sets // 10,
        tokens // 16: sets // 10,
        quarter: sets,
        tokens // 2: sets // 10,
        tokens: sets // 10,
    }
    return [agreement_of(graph, kept, max(some, 1)) for kept, some in counts.items()]


def compared_adaptive(row: prune.Pruner, grid: tuple[int, int], sets: int) -> list[dict[str, Any]]:
    """The same where the image finds the count."""
    graph = pruner_sets.graph(row.name, grid[0] * grid[1], grid, adaptive=True)
    return [{**agreement_of(graph, None, sets), "kept": "adaptive"}]


def agreement_of(graph: pruner_sets.Graph, kept: int | None, sets: int) -> dict[str, Any]:
    generator = np.random.default_rng(7)
    verdicts: Counter[str] = Counter()
    times = []
    for _ in range(sets):
        arrays = pruner_sets.random_features(generator, graph.grid)
        begin = time.perf_counter()
        graph(arrays, kept)
        times.append(time.perf_counter() - begin)
        verdicts.update(pruner_sets.agrees(graph, arrays, kept))
    equal, ties = verdicts["equal"], verdicts["tie"]
    return {
        "pruner": graph.pruner,
        "tokens": graph.grid[0] * graph.grid[1],
        "kept": graph.kept if kept is None else kept,
        "sets": sets,
        "equal": equal,
        "ties": ties,
        "different": sets - equal - ties,
        "ms": round(1e3 * float(np.median(times)), 2),
        "nodes": len(graph.model.graph),
    }


def measured_in_vision(
    names: list[str], rounds: int, scratch: Path, console: Console
) -> list[dict[str, Any]]:
    """Share that each pruner adds to the time of LLaVA-1.5's vision graph, keep 0.25."""
    checkpoint, _ = ensure_checkpoint(
        scratch / "llava-7b-tower", truncated(LLAVA_7B, text_layers=1, vision_layers=24)
    )
    table = Table("pruner", "vision, s", "vision with random, s", "added", "nodes")
    rows = []
    with tempfile.TemporaryDirectory(prefix="vision-", dir=scratch) as folder:
        pixels = np.random.default_rng(1).standard_normal((1, 3, 336, 336)).astype(np.float32)
        expression = np.array([[0, *range(5, 3 + TEXT_IDS), 1]])
        baseline, _ = vision_graph("random", checkpoint, Path(folder) / "random")
        for name in names:
            graph, nodes = vision_graph(name, checkpoint, Path(folder) / name)
            times: dict[str, list[float]] = {"own": [], "baseline": []}
            for turn in range(rounds + 1):
                for who, runner in (("own", graph), ("baseline", baseline)):
                    feeds = {"pixel_values": pixels, "text_ids": expression}
                    wanted = {value.name: feeds[value.name] for value in runner.get_inputs()}
                    begin = time.perf_counter()
                    runner.run(None, wanted)
                    if turn:  # the first one warms up
                        times[who].append(time.perf_counter() - begin)
            own, other = (float(np.median(times[who])) for who in ("own", "baseline"))
            ratio = float(np.median(np.array(times["own"]) / np.array(times["baseline"])))
            rows.append(
                {"pruner": name, "seconds": own, "seconds_random": other, "added": round(ratio - 1, 4), "nodes": nodes}
            )  # fmt: skip
            console.print(f"{name}: {own:.2f} s, with random {other:.2f} s, added {100 * (ratio - 1):.1f} %")
            table.add_row(name, f"{own:.2f}", f"{other:.2f}", f"{100 * (ratio - 1):.1f} %", str(nodes))
            shutil.rmtree(Path(folder) / name)  # every graph has converted weights of its own
    console.print(table)
    return rows


def vision_graph(name: str, checkpoint: Path, folder: Path) -> tuple[Any, int]:
    """A session on the vision graph with a pruner, fp32, and how many nodes the graph has."""
    from gap_export.pipeline.graphs import export_graphs
    from gap_export.recipe.recipe import load_recipe

    text_tower = ensure_text_tower(checkpoint.parent / "clip-l-text")
    recipe = load_recipe("llava").replaced(
        checkpoint=str(checkpoint), pruner=name, precision="fp32", text_tower=str(text_tower)
    )
    folder.mkdir()
    graph = export_graphs(recipe, folder, only={"vision"}).graphs["vision"]
    return session(folder / graph.file), sum(graph.operators.values())


def ensure_text_tower(folder: Path) -> Path:
    """A CLIP checkpoint with the text tower and projections of ViT-L/14, random weights, and one layer of its vision tower; its
    tokenizer knows no word."""
    if not (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer, models, processors
        from transformers import CLIPConfig, CLIPModel

        text = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "projection_dim": ALIGNED,
        }
        vision = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 1,
            "patch_size": 14,
        }
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=ALIGNED)
        CLIPModel(config).save_pretrained(folder)
        ends = {"<|startoftext|>": 0, "<|endoftext|>": 1}
        tokenizer = Tokenizer(models.WordLevel({**ends, "<unk>": 2}, unk_token="<unk>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|startoftext|> $A <|endoftext|>", special_tokens=list(ends.items())
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options)


if __name__ == "__main__":
    sys.exit(main())
