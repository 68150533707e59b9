"""Does similarity to the text find the patches that matter?

    python -m training.clip_shapes.evaluate FOLDER --split held-out

Ranks the patches of `llava-shapes` by their similarity to the expression and counts what survives among the first K: objects
that are meant, objects that are named. Beside it the same by similarity to another scene's expression, by the class token's
attention, and at random. `--boxes` also lets `llava-shapes` answer with the tokens that were kept, position ids kept (`gap`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from gap_export.boxes.scenes import COLOURS, DEV_SEED, HELD_OUT_SEED, SHAPES, SIZES, Case, cases, make_scene
from training.clip_shapes.data import fitting, patch_features, shows_named
from training.clip_shapes.model import ClipShapes, load_checkpoint
from training.clip_shapes.vocabulary import named_kinds, text_ids
from training.shapes.data import MAX_OBJECTS, owner_map
from training.shapes.evaluate import evaluate, features_and_scores, summary
from training.shapes.model import PATCHES

KEPT = (72, 36, 16)
BATCH = 64


@dataclass(frozen=True)
class Truth:
    """What is where: owner [C, 144] (object index or 255), target [C], named [C, 6] objects that fit what is said."""

    owner: NDArray[np.uint8]
    target: NDArray[np.int64]
    named: NDArray[np.bool_]


def truth_of(scenes: list[Case], seed: int) -> Truth:
    """Truth of the first scenes of a split."""
    owner = np.zeros((len(scenes), PATCHES), np.uint8)
    target = np.zeros(len(scenes), np.int64)
    named = np.zeros((len(scenes), MAX_OBJECTS), np.bool_)
    for index, case in enumerate(scenes):
        objects = make_scene(seed, index).objects
        kinds = [
            (SHAPES.index(item.shape), COLOURS.index(item.colour), SIZES.index(item.size)) for item in objects
        ]
        fits = fitting(
            np.array([kinds], np.uint8), np.array([len(kinds)]), np.array([named_kinds(case.expression)])
        )
        owner[index] = owner_map(objects)
        target[index] = [item.box for item in objects].index(case.box)
        named[index, : len(objects)] = fits.any((0, 1))[0]
    return Truth(owner, target, named)


@torch.no_grad()
def rankings(
    model: ClipShapes, llava: LlavaForConditionalGeneration, scenes: list[Case]
) -> dict[str, Tensor]:
    """Scores of all patches [C, 144] by each way to rank them."""
    cosine, product, foreign, attention = [], [], [], []
    for start in track(range(0, len(scenes), BATCH), description="rank"):
        batch = scenes[start : start + BATCH]
        pixels = np.stack([np.asarray(case.image) for case in batch])
        features = patch_features(llava, pixels)
        text = model.texts(torch.tensor(text_ids([case.expression for case in batch])))[:, :, None]
        patches = model.patches(features)
        cosine.append((patches @ text)[..., 0])
        foreign.append((patches @ text.roll(1, dims=0))[..., 0])
        product.append((model.visual_projection(features) @ text)[..., 0])
        attention.append(features_and_scores(llava, pixels)[1])
    drawn = torch.rand(len(scenes), PATCHES, generator=torch.Generator().manual_seed(0))
    return {
        "cosine": torch.cat(cosine),
        "dot product": torch.cat(product),
        "another's text": torch.cat(foreign),
        "class token": torch.cat(attention),
        "random": drawn,
    }


def survival(scores_CN: Tensor, truth: Truth, kept: int) -> dict[str, float]:
    """Shares of meant objects with at least one and at least half of their patches among the first `kept`, and of named ones
    with at least half."""
    keep = np.zeros(scores_CN.shape, np.bool_)
    np.put_along_axis(keep, scores_CN.topk(kept, dim=-1).indices.numpy(), True, axis=1)
    owns_CON = truth.owner[:, None] == np.arange(MAX_OBJECTS)[:, None]
    left_CO = (owns_CON & keep[:, None]).sum(-1)
    half_CO = 2 * left_CO >= owns_CON.sum(-1)
    rows = np.arange(len(keep))
    return {
        "one": float((left_CO[rows, truth.target] > 0).mean()),
        "half": float(half_CO[rows, truth.target].mean()),
        "named half": float(half_CO[truth.named].mean()),
    }


def area_under_curve(scores_CN: Tensor, truth: Truth) -> float:
    """How often a patch on a named object scores higher than another patch of its image; mean over images."""
    shown_CN = shows_named(truth.owner, truth.named)
    areas = []
    for scores, shown in zip(scores_CN.numpy(), shown_CN, strict=True):
        gap = scores[shown][:, None] - scores[~shown]
        areas.append(((gap > 0) + 0.5 * (gap == 0)).mean())
    return float(np.mean(areas))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llava", type=Path, default=Path("gap_export/checkpoint/assets/llava-shapes"))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--split", choices=("dev", "held-out"), default="dev")
    parser.add_argument("--boxes", action="store_true", help="answer with the kept tokens too (minutes)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seed = HELD_OUT_SEED if arguments.split == "held-out" else DEV_SEED
    scenes = list(cases(arguments.count, seed))
    truth = truth_of(scenes, seed)
    llava = LlavaForConditionalGeneration.from_pretrained(arguments.llava, dtype=torch.float32).eval()
    table = Table(title=f"{arguments.count} {arguments.split} scenes, seed {seed}; shares in %")
    columns = ("ranked by", "AUC", "kept", "meant: one", "meant: half", "named: half", "gap acc@0.5")
    for column in columns if arguments.boxes else columns[:-1]:
        first = column == columns[0]
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    record: dict[str, dict[str, float | dict[str, float]]] = {}
    for name, scores in rankings(load_checkpoint(arguments.folder), llava, scenes).items():
        auc = area_under_curve(scores, truth)
        record[name] = {"auc": auc}
        rows = {kept: survival(scores, truth, kept) for kept in KEPT}
        if arguments.boxes:
            boxes = evaluate(llava, scenes, [kept / PATCHES for kept in KEPT], ["gap"], scores)
            rows = {
                kept: row | {"acc": summary(boxes[f"gap {kept / PATCHES}"])["acc"]}
                for kept, row in rows.items()
            }
            table.caption = f"all {PATCHES} tokens: acc@0.5 {summary(boxes['full'])['acc']:.1%}"
        for kept, row in rows.items():
            record[name][str(kept)] = row
            table.add_row(name, f"{auc:.3f}", str(kept), *(f"{100 * value:.1f}" for value in row.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
