"""Boxes of a `llava-shapes` checkpoint with all and with some of its visual tokens:

    python -m training.shapes.evaluate CHECKPOINT --count 2000 --split held-out

Runs the transformers modules in float32 with greedy decoding and a key-value cache. Tokens are pruned by CLS
attention (FasterVLM's score: softmax attention from CLS to the patches in the layer whose output is the feature,
averaged over heads). `gap` keeps every token's position id; `shifted` renumbers the survivors in order; `permuted`
hands them over in score order and renumbers. New tokens go on from the original length under `gap` and from the
pruned length under the other two.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from gap_export.boxes.scenes import DEV_SEED, HELD_OUT_SEED, IMAGE_SIZE, KINDS, Case, cases
from training.shapes.model import IMAGE_MEAN, IMAGE_STD, PATCHES
from training.shapes.vocabulary import (
    COORDINATE_BINS,
    FIRST_COORDINATE_ID,
    TOKEN_ID,
    prefix_ids,
    question_ids,
)

ANSWER_TOKENS = 10
NO_BOX = -1.0  # stands for the IoU of an answer that spells no box
POLICIES = ("gap", "shifted", "permuted")


@torch.no_grad()
def features_and_scores(
    model: LlavaForConditionalGeneration, pixels_BHWC: NDArray[np.uint8]
) -> tuple[Tensor, Tensor]:
    """Projected visual tokens [B, N, H] and CLS scores [B, N]."""
    pixels = torch.from_numpy(np.ascontiguousarray(pixels_BHWC)).permute(0, 3, 1, 2).float() / 255
    processed = (pixels - IMAGE_MEAN[0]) / IMAGE_STD[0]
    tower = model.model.vision_tower
    layer_index = model.config.vision_feature_layer  # -2: the output of the last layer but one
    states = tower(processed, output_hidden_states=True).hidden_states
    layer = tower.encoder.layers[layer_index]
    normed = layer.layer_norm1(states[layer_index - 1])
    attention = layer.self_attn
    batch, tokens, _ = normed.shape
    q = attention.q_proj(normed[:, :1]).view(batch, 1, attention.num_heads, -1).transpose(1, 2)
    k = attention.k_proj(normed).view(batch, tokens, attention.num_heads, -1).transpose(1, 2)
    scores = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1).mean(1)[:, 0, 1:]
    return model.model.multi_modal_projector(states[layer_index][:, 1:]), scores


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration,
    visual_BKH: Tensor,
    kept_BK: Tensor,
    question_BT: Tensor,
    policy: str,
) -> Tensor:
    """Greedy answers, token ids [B, 10]. `kept` are raster indices in the order of `visual`; all questions of a call have
    the same length."""
    batch, kept = kept_BK.shape
    prefix = torch.tensor(prefix_ids()).expand(batch, -1)
    before, text = prefix.shape[1], question_BT.shape[1]
    embed = model.get_input_embeddings()
    inputs = torch.cat([embed(prefix), visual_BKH, embed(question_BT)], dim=1)
    if policy == "gap":
        visual_ids, following = before + kept_BK, before + PATCHES
    else:
        visual_ids, following = (before + torch.arange(kept)).expand(batch, -1), before + kept
    ids = torch.cat(
        [
            torch.arange(before).expand(batch, -1),
            visual_ids,
            (following + torch.arange(text)).expand(batch, -1),
        ],
        dim=1,
    )
    cache = DynamicCache(config=model.config.text_config)
    tokens: list[Tensor] = []
    for step in range(ANSWER_TOKENS):
        # The explicit mask keeps transformers from reading the gaps in the ids as packed sequences.
        mask = torch.ones(batch, before + kept + text + step, dtype=torch.long)
        output = model.model.language_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=ids, past_key_values=cache, use_cache=True
        )
        token = model.lm_head(output.last_hidden_state[:, -1]).argmax(-1)
        tokens.append(token)
        inputs, ids = embed(token[:, None]), torch.full((batch, 1), following + text + step)
    return torch.stack(tokens, dim=1)


def box_of(tokens: NDArray[np.int64]) -> tuple[float, float, float, float] | None:
    """The box in pixels that ten answer tokens spell, or None where they spell none."""
    corners = tokens[[1, 3, 5, 7]] - FIRST_COORDINATE_ID
    frame = [TOKEN_ID[word] for word in ("[", ",", ",", ",", "]")]
    if list(tokens[[0, 2, 4, 6, 8]]) != frame or not ((corners >= 0) & (corners < COORDINATE_BINS)).all():
        return None
    x0, y0, x1, y1 = (float(value) / COORDINATE_BINS * IMAGE_SIZE for value in corners)
    return x0, y0, x1, y1


def iou(first: Iterable[float] | None, second: Iterable[float]) -> float:
    """Intersection over union of two (x0, y0, x1, y1) boxes; 0 where the first is empty, NO_BOX where there is none."""
    if first is None:
        return NO_BOX
    ax0, ay0, ax1, ay1 = first
    bx0, by0, bx1, by1 = second
    overlap = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = max(0.0, ax1 - ax0) * max(0.0, ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    return overlap / union if overlap > 0 else 0.0


def evaluate(
    model: LlavaForConditionalGeneration,
    scenes: list[Case],
    keeps: list[float],
    policies: Iterable[str] = POLICIES,
    scores: Tensor | None = None,
) -> dict[str, NDArray[np.float64]]:
    """IoU per case for "full" and for every "<policy> <keep>". Tokens are kept by `scores` [cases, N], by default CLS attention."""
    groups: dict[int, list[int]] = {}
    for index, case in enumerate(scenes):
        groups.setdefault(len(question_ids(case.expression)), []).append(index)
    batches = [rows[start : start + 128] for rows in groups.values() for start in range(0, len(rows), 128)]
    settings = [("full", "gap", PATCHES)]
    settings += [(f"{policy} {keep}", policy, round(keep * PATCHES)) for keep in keeps for policy in policies]
    results = {name: np.zeros(len(scenes)) for name, _, _ in settings}
    for rows in track(batches, description="evaluate"):
        pixels = np.stack([np.asarray(scenes[row].image) for row in rows])
        visual, ranks = features_and_scores(model, pixels)
        if scores is not None:
            ranks = scores[rows]
        question = torch.tensor([question_ids(scenes[row].expression) for row in rows])
        for name, policy, count in settings:
            kept = ranks.topk(count, dim=-1).indices
            if policy != "permuted":
                kept = kept.sort(dim=-1).values
            tokens = answer(model, torch.take_along_dim(visual, kept[..., None], 1), kept, question, policy)
            for row, spelt in zip(rows, tokens.numpy(), strict=True):
                results[name][row] = iou(box_of(spelt), scenes[row].box)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--split", choices=("dev", "held-out"), default="dev")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.5, 0.25, 0.11])
    parser.add_argument("--policies", nargs="*", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = LlavaForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    seed = HELD_OUT_SEED if arguments.split == "held-out" else DEV_SEED
    scenes = list(cases(arguments.count, seed))
    results = evaluate(model, scenes, arguments.keep, arguments.policies)
    table = Table(title=f"{arguments.count} {arguments.split} scenes, seed {seed}, CLS-attention pruner")
    for column in ("setting", "acc@0.5 %", "s.e.", "mean IoU", "share of full", "no box %", *KINDS):
        table.add_column(column, justify="left" if column == "setting" else "right")
    kinds = np.array([kind_of(case.expression) for case in scenes])
    full = summary(results["full"])["acc"]
    record = {}
    for name, values in results.items():
        row = summary(values) | {kind: summary(values[kinds == kind])["acc"] for kind in KINDS}
        row["share"] = row["acc"] / full if full else math.nan
        record[name] = row
        table.add_row(
            name,
            f"{row['acc']:.1%}",
            f"{row['se']:.1%}",
            f"{row['miou']:.3f}",
            f"{row['share']:.3f}",
            f"{row['no_box']:.1%}",
            *(f"{row[kind]:.1%}" for kind in KINDS),
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2))


def kind_of(expression: str) -> str:
    """What an expression goes by, read from its words."""
    if any(f" {word} " in expression for word in ("of", "above", "below")):
        return "relation"
    return "location" if " on the " in expression or " at the " in expression else "attributes"


def summary(values: NDArray[np.float64]) -> dict[str, float]:
    """Accuracy at IoU 0.5 with its standard error, mean IoU, share of answers without a box."""
    accuracy = float((values >= 0.5).mean())
    return {
        "acc": accuracy,
        "se": math.sqrt(accuracy * (1 - accuracy) / len(values)),
        "miou": float(values.clip(min=0).mean()),
        "no_box": float((values == NO_BOX).mean()),
    }


if __name__ == "__main__":
    main()
