"""Trains `clip-shapes` on the frozen vision tower of `llava-shapes`: python -m training.clip_shapes.train --out DIR

Texts are held against patches of generated scenes (training split): a text's own image must show it better than images
that do not, and within its image the patches of what it names must come before the others. A run that was stopped goes on
where it was when started again with the same `--out` and `--resume`; `DIR/checkpoint` holds the newest averaged weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, LlavaForConditionalGeneration

from training.clip_shapes.data import Pairs, cache_patches, fitting, pairs_from_bank, shows_named
from training.clip_shapes.losses import image_loss, image_scores, patch_loss
from training.clip_shapes.model import ClipShapes, build_config, build_model, save_checkpoint
from training.shapes.data import build_bank, load_bank
from training.shapes.loop import Average, StageConfig, run_stage

QUERIES_PER_VIEW = 16
BATCH = 128


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--llava", type=Path, default=Path("gap_export/checkpoint/assets/llava-shapes"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=5_000, help="each is seen mirrored as well")
    parser.add_argument("--bank", type=Path, help="folder of scenes and patches, to share them between runs")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--patch", type=float, default=1.0, help="weight of the loss within an image")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def losses(
    model: ClipShapes, pairs: Pairs, rng: np.random.Generator, weight: float, batch: int = BATCH
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of one batch: images with one expression each."""
    views = rng.integers(pairs.views, size=batch)
    texts = pairs.expressions[views, rng.integers(pairs.expressions.shape[1], size=batch)]
    fits_T2BO = fitting(pairs.kinds[views], pairs.counts[views], pairs.named[texts])
    absent_TB = ~fits_T2BO.any((1, 3))
    own = np.arange(batch)
    named_BN = shows_named(pairs.owner[views], fits_T2BO.any(1)[own, own])

    text_TD = model.texts(torch.from_numpy(pairs.texts[texts]))
    patches_BND = model.patches(torch.from_numpy(pairs.patches[views]).float())
    similarity_TBN = model.scale * torch.einsum("td,bnd->tbn", text_TD, patches_BND)
    between = image_loss(image_scores(similarity_TBN), torch.from_numpy(absent_TB))
    within = patch_loss(similarity_TBN[own, own], torch.from_numpy(named_BN))
    metrics = {"between": between.item(), "within": within.item(), "scale": model.scale.item()}
    return between + weight * within, metrics


def train(model: ClipShapes, config: CLIPConfig, pairs: Pairs, arguments: argparse.Namespace) -> None:
    """Trains to the end; leaves the averaged weights in `model` and on disk."""

    def step(number: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        return losses(model, pairs, rng, arguments.patch)

    def export(average: Average) -> None:
        averaged = build_model(config, arguments.seed)
        averaged.load_state_dict(average.values)
        save_checkpoint(averaged, config, arguments.out / "checkpoint")

    stage = StageConfig("clip", arguments.steps, learning_rate=2e-3, average=0.99)
    average = run_stage(stage, arguments.seed, model, step, arguments.out, export)
    model.load_state_dict(average.values)


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    if (out / "clip.pt").exists() and not arguments.resume:
        raise SystemExit(
            f"{out} holds a run already: add --resume to go on with it, or choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    folder = arguments.bank or out / "bank"
    build_bank(folder, arguments.scenes, QUERIES_PER_VIEW)
    bank = load_bank(folder)
    llava = LlavaForConditionalGeneration.from_pretrained(arguments.llava, dtype=torch.float32).eval()
    pairs = pairs_from_bank(bank, cache_patches(llava, bank, folder))
    config = build_config(llava.config.vision_config)
    train(build_model(config, arguments.seed), config, pairs, arguments)


if __name__ == "__main__":
    main()
