"""What sharing the beginning of prompts saves in an evaluation. See README.md for the protocol.

    python bench/evaluation.py [--images N] [--label TEXT]

The bundled model, seven expressions per image, every image answered both ways in turn: beginning shared, expressions batched; and
prompts whole, one by one. The last line printed is the record, also stored in bench/results/.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import harness
import numpy as np
from rich.console import Console
from rich.progress import track

PER_IMAGE = 7
TARGET = 3.0


def main() -> int:
    parser = harness.parser_of(__doc__)
    parser.add_argument("--images", type=int, default=100)
    options = parser.parse_args()

    from gap_export.evaluation.refer.dataset import open_dataset
    from gap_export.evaluation.refer.evaluator import Evaluator
    from gap_export.evaluation.refer.run import work_of
    from gap_export.pipeline.build import build
    from gap_export.recipe.recipe import load_recipe
    from gap_export.runtime.backends import open_session

    console = Console(stderr=True)
    dataset = open_dataset(f"scenes:{PER_IMAGE}")
    assert dataset.source is not None
    groups = [
        group
        for group in work_of(dataset.expressions, dataset.source).groups.values()
        if len(group) == PER_IMAGE
    ][: options.images]
    with tempfile.TemporaryDirectory() as scratch:
        bundle = build(load_recipe("shapes"), Path(scratch) / "bundle", golden=False).bundle
        session = open_session(bundle, "onnxruntime")
        ways = {
            name: Evaluator(bundle, session, share=share)
            for name, share in (("shared", True), ("whole", False))
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        different = 0
        for number, group in enumerate(track(groups, "answering", console=console)):
            image, texts = dataset.source.open(group[0].image), [each.text for each in group]
            answers = {}
            # Each way goes first every other time.
            for name in sorted(ways, reverse=bool(number % 2)):
                answered = ways[name].answer_image(image, texts)
                answers[name] = [(each.text, each.tokens, each.kept_indices) for each in answered]
                seconds[name].append(sum(each.seconds for each in answered))
            different += sum(a != b for a, b in zip(answers["shared"], answers["whole"], strict=True))
    ratios = np.array(seconds["whole"]) / np.array(seconds["shared"])
    low, median, high = (round(float(value), 2) for value in np.percentile(ratios, (10, 50, 90)))
    measured = {
        "images": len(groups),
        "expressions_per_image": PER_IMAGE,
        "times_as_fast": {"p10": low, "p50": median, "p90": high},
        "milliseconds_per_image": {
            name: round(1000 * float(np.median(values)), 1) for name, values in seconds.items()
        },
        "different_answers": different,
        "target": {"times_as_fast": TARGET, "different_answers": 0},
    }
    console.print(
        f"shared prompts are {median} times as fast (10th to 90th percentile {low} to {high}); {different} of "
        f"{PER_IMAGE * len(groups)} answers differ"
    )
    return harness.finish("evaluation", measured, label=options.label, ok=median >= TARGET and not different)


if __name__ == "__main__":
    raise SystemExit(main())
