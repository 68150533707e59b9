"""Does a decoder as wide as LLaVA-1.5-7B's, exported from fp16 shards to fp32 graphs, compute what transformers computes?

    python bench/wide_decoder.py [--scratch FOLDER] [--label TEXT]

Two decoder layers and three tower layers, every width as published, random weights: what a small test model cannot show
(32 heads, matrices of 11008 columns, conversion of tensors of 260 MB) at a size that a CPU can run. ONNX Runtime
and PyTorch each run in a process of their own. The last line printed is the record, also stored in bench/results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import IMAGE_TOKEN, LLAVA_7B, ensure_checkpoint, truncated
from rich.console import Console

STEPS = ("build", "onnxruntime", "torch")
MAX_DIFFERENCE = 1e-4
"""Largest difference of logits, relative to the largest logit."""
NEW_TOKENS = 6
TEXT_BEFORE, TEXT_AFTER = 35, 24  # as in LLaVA-1.5's grounding prompt


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # how this script calls itself
    options = parser.parse_args()
    checkpoint, bundle = options.scratch / "llava-7b-2-layers", options.scratch / "bundle-2-layers"
    if options.step:
        print(json.dumps(run_step(options.step, checkpoint, bundle)))
        return 0

    console = Console()
    ensure_checkpoint(checkpoint, truncated(LLAVA_7B, text_layers=2, vision_layers=3))
    shutil.rmtree(bundle, ignore_errors=True)
    results: dict[str, dict[str, Any]] = {}
    for step in STEPS:
        command = [sys.executable, __file__, "--scratch", str(options.scratch), "--step", step]
        results[step] = harness.in_fresh_process(command)
        console.print(f"{step}: peak RSS {results[step]['peak_rss_gb']:.2f} GB")

    ours, theirs = (np.load(bundle / f"{name}.npz") for name in ("onnxruntime", "torch"))
    largest = float(np.abs(theirs["logits"]).max())
    differences = np.abs(ours["logits"] - theirs["logits"]).max(axis=(1, 2)) / largest
    measured = {
        "relative_difference_prefill": float(differences[0]),
        "relative_difference_decode": float(differences[1:].max()),
        "relative_difference_if_renumbered": float(
            np.abs(ours["renumbered"] - theirs["logits"][0]).max() / largest
        ),
        "kept_sets_equal": bool((ours["kept_indices"] == theirs["kept_indices"]).all()),
        "position_ids_equal": bool((ours["position_ids"] == theirs["position_ids"]).all()),
        "tokens_equal": bool((ours["tokens"] == theirs["tokens"]).all()),
    }
    shutil.rmtree(bundle)
    for name, value in measured.items():
        console.print(f"{name.replace('_', ' ')}: {value}")
    ok = (
        bool(differences.max() <= MAX_DIFFERENCE < measured["relative_difference_if_renumbered"])
        and measured["kept_sets_equal"]
        and measured["position_ids_equal"]
        and measured["tokens_equal"]
    )
    return harness.finish(
        "wide_decoder",
        {**measured, "limit": MAX_DIFFERENCE, "largest_logit": largest, "steps": results},
        label=options.label,
        ok=ok,
    )


def run_step(step: str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    from gap_export.bundle.folder import open_bundle
    from gap_export.environment import peak_rss_bytes

    if step == "build":
        from gap_export.pipeline.build import build
        from gap_export.recipe.recipe import load_recipe

        recipe = load_recipe("llava").replaced(checkpoint=str(checkpoint), precision="fp32")
        facts: dict[str, Any] = {
            "written_mb": round(build(recipe, folder, golden=False).written_bytes / 1e6, 1)
        }
    else:
        facts = {}
        answer(step, folder, open_bundle(folder))
    peak = peak_rss_bytes()
    return {**facts, "peak_rss_gb": round(peak / 1e9, 2) if peak else None}


def answer(backend: str, folder: Path, bundle: Any) -> None:
    """Two rows of different length, greedily, every logit kept."""
    from gap_export import positions
    from gap_export.inputs.batch import of_one_size
    from gap_export.positions import PAD
    from gap_export.runtime.backends import open_session
    from gap_export.runtime.generate import generate

    session = open_session(bundle, backend)
    random = np.random.default_rng(1)
    pixels = random.standard_normal((2, 3, 336, 336), np.float32)
    input_ids_BT = np.full((2, TEXT_BEFORE + 1 + TEXT_AFTER), PAD, np.int64)
    for row, after in enumerate((TEXT_AFTER, TEXT_AFTER // 2)):
        prompt = random.integers(3, IMAGE_TOKEN, TEXT_BEFORE + 1 + after)
        prompt[TEXT_BEFORE] = IMAGE_TOKEN
        input_ids_BT[row, : len(prompt)] = prompt
    made = generate(
        session,
        of_one_size(pixels, 576),
        input_ids_BT,
        max_new_tokens=NEW_TOKENS,
        eos_token_ids=(),
        keep_logits=True,
    )
    # Negative control: a comparison that does not notice renumbered ids proves nothing.
    wrong = generate(
        session,
        of_one_size(pixels, 576),
        input_ids_BT,
        max_new_tokens=1,
        eos_token_ids=(),
        adjust=positions.renumbered,
    )
    shortest = int(made.placement.next_slot.min())
    np.savez(
        folder / f"{backend}.npz",
        logits=np.stack(made.logits),
        renumbered=wrong.logits[0],
        kept_indices=made.kept_indices,
        tokens=np.array(made.tokens),
        position_ids=made.placement.position_ids[:, :shortest],  # beyond it stands padding
    )


if __name__ == "__main__":
    sys.exit(main())
