"""A bundle with a trained decoder of 135 million parameters, which computes long enough that what surrounds it is seen as the small share that it is."""

from __future__ import annotations

from pathlib import Path

import asking
import real_weights

import gap_export as gap


def ensure_trained(scratch: Path) -> Path:
    """The bundle of `asking.py`, with texts of 256 tokens, answers of 24, and requests that choose their share of the visual tokens.

    Args:
        scratch: folder of bundles, where an earlier run's is found again. Needs the environment of `peers/environment.py` for the weights.
    """
    folder = scratch / "bundle-serve-trained"
    if not (folder / "golden.json").exists():
        decoder, _ = real_weights.ensure_decoder(scratch)
        checkpoint = asking.ensure_chat(scratch, decoder, real_weights.ensure_llava(scratch, decoder))
        recipe = gap.Recipe.load(
            "llava",
            checkpoint=str(checkpoint),
            precision="fp32",
            keep="0.1:0.25:1.0",
            pruner="cls_attention",
            max_text=256,
            max_new_tokens=24,
            max_batch=8,
            prompt=asking.as_grounding_prompt((checkpoint / asking.TEMPLATE).read_text()),
        )
        gap.build(recipe, folder, replace=True)
    return folder
