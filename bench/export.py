"""What exporting models of full size costs: peak memory, time, bytes written. See README.md for the protocol.

    python bench/export.py [--builds NAMES] [--scratch FOLDER] [--label TEXT] [--keep]

Stand-ins for LLaVA-1.5-7B and -13B (14 and 27 GB of random fp16 weights) are written one after the other. Each build runs in a fresh
process, so that its peak is its own. The decoder of 7B is built twice: with layers copied, as builds do, and with every layer traced; what both
write must be equal. The last line printed is the record, also stored in bench/results/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import LLAVA_7B, LLAVA_13B, ensure_checkpoint
from rich.console import Console
from rich.table import Table

from gap_export.progress import Progress, Stages


@dataclass(frozen=True)
class Build:
    """One thing to measure.

    Attributes:
        model: name of the stand-in.
        what: `decoder` (one graph) or `bundle` (what `gap-export build` does).
        targets: figure -> most that is allowed.
        whole: whether every layer is traced, and none copied.
    """

    model: str
    what: str
    targets: dict[str, float]
    whole: bool = False


CONFIGS = {"llava-7b": LLAVA_7B, "llava-13b": LLAVA_13B}
BUILDS = {
    "7b-decoder": Build(
        "llava-7b",
        "decoder",
        {"peak_rss_gb": 0.65, "written_mb": 10.0, "seconds": 60.0, "of_whole": 0.5, "different_files": 0},
    ),
    "7b-decoder-whole": Build(
        "llava-7b", "decoder", {"peak_rss_gb": 1.0, "written_mb": 10.0, "seconds": 120.0}, whole=True
    ),
    "7b-bundle": Build("llava-7b", "bundle", {"peak_rss_gb": 1.5, "written_mb": 10.0}),
    "13b-decoder": Build("llava-13b", "decoder", {"peak_rss_gb": 1.0, "written_mb": 10.0, "seconds": 200.0}),
}
COMPARED = {"7b-decoder": "7b-decoder-whole"}
"""Build with copied layers -> the same with every layer traced."""
UNITS = {
    "peak_rss_gb": "peak RSS, GB",
    "written_mb": "newly written, MB",
    "seconds": "wall time, s",
    "cpu_seconds": "processor time, s",
    "of_whole": "wall time, of that with every layer traced",
    "tracing_of_whole": "time of tracing, of that of every layer",
    "different_files": "files that differ from those",
}


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--builds", default=",".join(BUILDS), help="which, separated by commas")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in the scratch folder")
    parser.add_argument("--build", choices=BUILDS, help=argparse.SUPPRESS)  # how this script calls itself
    options = parser.parse_args()
    if options.build:
        build = BUILDS[options.build]
        folders = options.scratch / build.model, options.scratch / "bundle"
        print(json.dumps(measured_build(build, *folders)))
        return 0

    console, builds, sizes = Console(), {}, {}
    wanted = {name: BUILDS[name] for name in options.builds.split(",")}
    for model in dict.fromkeys(build.model for build in wanted.values()):
        console.print(f"checkpoint: [bold]{model}[/], random weights")
        folder, sizes[model] = ensure_checkpoint(options.scratch / model, CONFIGS[model])
        for name in (name for name, build in wanted.items() if build.model == model):
            console.print(f"building {name} in a process of its own")
            command = [sys.executable, __file__, "--scratch", str(options.scratch), "--build", name]
            builds[name] = harness.in_fresh_process(command)
            shutil.rmtree(options.scratch / "bundle", ignore_errors=True)
        if not options.keep:
            shutil.rmtree(folder)

    for name in COMPARED.keys() & builds.keys():
        if COMPARED[name] in builds:
            builds[name] |= compared(builds[name], builds[COMPARED[name]])
    met = {
        name: {
            what: builds[name][what] <= limit for what, limit in build.targets.items() if what in builds[name]
        }
        for name, build in wanted.items()
    }
    console.print(table(builds))
    targets = {name: build.targets for name, build in wanted.items()}
    return harness.finish(
        "export",
        {"weight_bytes": sizes, "builds": builds, "targets": targets, "met": met},
        label=options.label,
        ok=all(all(each.values()) for each in met.values()),
    )


def compared(build: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Time as a share of that of a build in which every layer is traced, and how many of the files differ."""
    files, others = build["files"], whole["files"]
    traced = [each["stages"]["tracing decoder"] for each in (build, whole)]
    return {
        "of_whole": round(build["seconds"] / whole["seconds"], 3),
        "tracing_of_whole": round(traced[0] / traced[1], 3),
        "different_files": sum(files.get(name) != others.get(name) for name in files | others),
    }


def measured_build(build: Build, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Build here, with an empty trace cache; what it took, by stage."""
    from gap_export.environment import peak_rss_bytes

    os.environ["GAP_EXPORT_TRACE_CACHE"] = "off"
    stages: list[tuple[str, float]] = []

    def began(words: str) -> None:
        stages.append((words, time.perf_counter()))
        print(f"  {words}", file=sys.stderr)

    build_it = build_decoder if build.what == "decoder" else build_bundle
    build_it(checkpoint, out, Stages(began), whole=build.whole)
    ends = [moment for _, moment in stages[1:]] + [time.perf_counter()]
    peak = peak_rss_bytes()
    if peak is None:
        raise SystemExit(
            "this system does not tell a process its peak memory (no /proc): run the benchmark on Linux"
        )
    written = [path for path in out.rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    return {
        "peak_rss_gb": round(peak / 1e9, 3),
        "cpu_seconds": round(time.process_time(), 2),
        "written_mb": round(sum(path.stat().st_size for path in written) / 1e6, 2),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written},
        "stages": {words: round(end - start, 2) for (words, start), end in zip(stages, ends, strict=True)},
    }


def recipe_for(checkpoint: Path) -> Any:
    from gap_export.recipe.recipe import load_recipe

    return load_recipe("llava").replaced(checkpoint=str(checkpoint))


def build_bundle(checkpoint: Path, out: Path, progress: Progress, *, whole: bool) -> None:
    """What `gap-export build --model llava` does with an empty trace cache."""
    from gap_export.graph.trace_cache import Tracer
    from gap_export.pipeline.build import build

    build(recipe_for(checkpoint), out, golden=False, tracer=Tracer(None, whole=whole), progress=progress)


def build_decoder(checkpoint: Path, out: Path, progress: Progress, *, whole: bool) -> None:
    """The same for the decoder graph alone: no other graph, no tokenizer, no hashes."""
    progress.stage("importing")
    from gap_export.graph.trace_cache import Tracer
    from gap_export.pipeline.graphs import export_graphs

    out.mkdir(parents=True)
    tracer = Tracer(None, whole=whole)
    export_graphs(recipe_for(checkpoint), out, only={"decoder"}, tracer=tracer, progress=progress)


def table(builds: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="export at full size")
    shown.add_column("build")
    shown.add_column("quantity")
    shown.add_column("measured", justify="right")
    shown.add_column("target", justify="right")
    for name, build in builds.items():
        for what, words in UNITS.items():
            limit = BUILDS[name].targets.get(what)
            if what in build:
                shown.add_row(
                    name, words, f"{build[what]:.2f}", "" if limit is None else f"at most {limit:g}"
                )
        for words, seconds in build["stages"].items():
            shown.add_row("", f"  {words}, s", f"{seconds:.2f}", "")
    return shown


if __name__ == "__main__":
    sys.exit(main())
