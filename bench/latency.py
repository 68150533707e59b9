"""Does GAP cost time, and does pruning save it? See README.md for the protocol.

    python bench/latency.py [--requests N] [--threads N] [--label TEXT] [--smoke]

Three bundles of the bundled model, which differ in one thing each, answer the same request in turn: GAP and renumbered ids
at a quarter of the visual tokens, and nothing pruned. The last line printed is the record, also stored in bench/results/.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
from rich.console import Console

BUNDLES: dict[str, dict[str, Any]] = {
    "gap@0.25": {"positions": "gap", "keep": 0.25},
    "shifted@0.25": {"positions": "shifted", "keep": 0.25},
    "none@1.0": {"pruner": "none", "keep": 1.0},
}
TOLERANCE = 0.03
"""GAP changes values of one small integer input and no shape, so its median must be that of renumbered ids, within this."""
WARMUP = 20


def main() -> int:
    parser = harness.parser_of(__doc__)
    parser.add_argument("--requests", type=int, default=300, help="measured, per bundle")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="40 requests, nothing stored, no target: does it run, and what has moved?",
    )
    options = parser.parse_args()
    requests = 40 if options.smoke else options.requests

    from gap_export.bundle.folder import open_bundle
    from gap_export.cli.progress import progress_shown
    from gap_export.evaluation.latency.candidate import candidate
    from gap_export.evaluation.latency.measure import measure
    from gap_export.evaluation.latency.show import tables
    from gap_export.runtime.backends import open_session

    console = Console()
    with tempfile.TemporaryDirectory(prefix="gap-export-latency-") as scratch:
        folders = {name: Path(scratch) / name for name in BUNDLES}
        # BuildResult by a child, so that PyTorch is neither in memory nor in the way of what is measured here.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as builder:
            for name, folder in folders.items():
                console.print(f"building {name}")
                builder.submit(build_bundle, folder, BUNDLES[name]).result()
        bundles = {name: open_bundle(folder) for name, folder in folders.items()}
        candidates = [
            candidate(name, bundle, open_session(bundle, "onnxruntime", threads=options.threads))
            for name, bundle in bundles.items()
        ]
        with progress_shown() as progress:
            measured = measure(
                candidates,
                requests=requests,
                warmup=WARMUP,
                new_tokens=bundles["gap@0.25"].manifest.max_new_tokens,
                progress=progress,
            )
    for table in tables(measured):
        console.print(table)

    def total(numerator: str, denominator: str) -> Any:
        wanted = (numerator, denominator, "total_ms")
        return next(r for r in measured.ratios if (r.numerator, r.denominator, r.quantity) == wanted)

    position_ids, pruning = total("gap@0.25", "shifted@0.25"), total("gap@0.25", "none@1.0")
    free = abs(position_ids.ratio - 1) <= TOLERANCE
    console.print(
        f"GAP / shifted: {position_ids.ratio:.3f} ({position_ids.low:.3f} to {position_ids.high:.3f}), "
        f"{'within' if free else 'OUTSIDE'} 1 ± {TOLERANCE:g}"
    )
    console.print(f"keep 0.25 / keep 1.0: {pruning.ratio:.3f} ({pruning.low:.3f} to {pruning.high:.3f})")
    for words in moved(json.loads((harness.RESULTS / "latency.json").read_text())["ratios"], measured.ratios):
        console.print(words, highlight=False)
    return harness.finish(
        "latency",
        {"threads": options.threads, **measured.model_dump(mode="json")},
        label=options.label,
        ok=free or options.smoke,
        store=not options.smoke,
    )


def moved(before: list[dict[str, Any]], now: Any) -> list[str]:
    """Ratios whose interval holds the last record's no more, in words; those of few requests move by chance."""
    last = {(each["numerator"], each["denominator"], each["quantity"]): each["ratio"] for each in before}
    lines = []
    for each in now:
        then = last.get((each.numerator, each.denominator, each.quantity))
        if then is not None and not each.low <= then <= each.high:
            lines.append(
                f"moved: {each.numerator} / {each.denominator}, {each.quantity}: {then:.3f} -> {each.ratio:.3f} "
                f"({each.low:.3f} to {each.high:.3f})"
            )
    return lines or ["no ratio has moved since the last record"]


def build_bundle(folder: Path, changes: dict[str, Any]) -> None:
    from gap_export.pipeline.build import build
    from gap_export.recipe.recipe import load_recipe

    build(load_recipe("shapes").replaced(**changes), folder, golden=False)


if __name__ == "__main__":
    sys.exit(main())
