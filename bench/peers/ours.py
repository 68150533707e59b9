"""gap-export: a bundle, as `gap-export run` opens it.

python ours.py CHECKPOINT THREADS NEW_TOKENS KEEP POSITIONS PRECISION BACKEND
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from request import now, peak_rss_bytes, request, serve


def export(checkpoint: str, folder: str, keep: float, positions: str, precision: str) -> dict[str, Any]:
    """In a process of its own: PyTorch is neither in memory nor in the way of what is measured."""
    from gap_export.graph.trace_cache import Tracer
    from gap_export.pipeline.build import build
    from gap_export.recipe.recipe import load_recipe

    pruned: dict[str, Any] = {"pruner": "cls_attention", "keep": keep, "positions": positions}
    if keep == 1.0:
        pruned = {"pruner": "none", "keep": 1.0}
    began = now()
    small = Path(checkpoint).name == "llava-shapes"
    recipe = load_recipe("shapes" if small else "llava").replaced(
        precision=precision, max_new_tokens=256, **pruned
    )
    if not small:
        recipe = recipe.replaced(checkpoint=checkpoint)
    built = build(recipe, Path(folder), replace=True, golden=False, tracer=Tracer(None))
    return {
        "export_s": now() - began,
        "export_peak_rss_bytes": peak_rss_bytes(),
        "written_bytes": built.written_bytes,
    }


def main() -> None:
    checkpoint, threads, new_tokens, keep, positions, precision, backend = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir=Path(checkpoint).parent) as scratch:
        folder = f"{scratch}/bundle"
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as builder:
            facts = builder.submit(export, checkpoint, folder, float(keep), positions, precision).result()

        import numpy as np

        from gap_export.bundle.folder import open_bundle
        from gap_export.environment import versions
        from gap_export.evaluation.latency.candidate import Candidate
        from gap_export.evaluation.latency.cost import cost_of
        from gap_export.evaluation.latency.record import Device
        from gap_export.inputs.batch import of_one_size
        from gap_export.positions import advance
        from gap_export.runtime.backends import open_session
        from gap_export.runtime.generate import encode

        began = now()
        bundle = open_bundle(Path(folder))
        session = open_session(bundle, backend, threads=int(threads))
        load_s = now() - began
        asked = request(checkpoint)
        visual = bundle.manifest.spec.visual_tokens
        each = Candidate("ours", bundle, session, of_one_size(asked.pixels, visual), asked.input_ids[None])

        def answer() -> tuple[float, list[float], list[int]]:
            began = now()
            spliced = session.splice(each.input_ids_BT, encode(session, each.images))
            turn, logits = (
                spliced.placement,
                session.prefill(spliced.embeds, spliced.placement, reserve=int(new_tokens)).logits,
            )
            tokens, readings = [int(logits.argmax())], [now()]
            for _ in range(int(new_tokens) - 1):
                turn = advance(turn)
                logits = session.step(np.array([tokens[-1]], np.int64), turn)
                tokens.append(int(logits.argmax()))
                readings.append(now())
            return readings[0] - began, np.diff(readings).tolist(), tokens

        unknown = Device(flops_per_second=1.0, bytes_per_second=1.0, threads=int(threads))
        cost = cost_of(each, each.prompt_slots, each.capacities(int(new_tokens)), unknown)
        facts["first_token_flops"] = cost.first_token_flops
        serve({"versions": versions(), "load_s": load_s, **facts}, answer)


if __name__ == "__main__":
    main()
