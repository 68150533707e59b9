"""What the decoder is trained on: the answer's tokens, two read-outs that help, and the attention aids.

The aids bear on the figures with pruned tokens and are named in the model card; each can be switched off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.shapes.data import NO_OBJECT
from training.shapes.decoder import DecoderOutput
from training.shapes.model import GRID, HIDDEN, IMAGE_SIZE, PATCHES
from training.shapes.vocabulary import COORDINATE_BINS, FIRST_COORDINATE_ID, VOCABULARY

# Weights of the 10 predicted tokens "[ x0 , y0 , x1 , y1 ] </s>". Once x0 is known the object is given away, so the
# choice between objects is learnt at x0 alone; punctuation is learnt at once. Late in training the choice is mostly
# right, and what is left is precision, y0 first of all.
_TOKEN_WEIGHTS = (0.1, 4.0, 0.1, 1.0, 0.1, 1.0, 0.1, 1.0, 0.1, 0.1)
_LATE_TOKEN_WEIGHTS = (0.1, 4.0, 0.1, 2.0, 0.1, 1.0, 0.1, 1.5, 0.1, 0.1)
_LATE_BACKGROUND = 6.0  # factor on the text-to-background penalty late in training
_SCALE = 6.0
_ALONE = 0.3  # questions without an image, weight of their mean loss per token
FIRST_COORDINATE = 1
PLACE_LAYER, BOX_LAYER = 1, 2  # decoder layers whose output the read-outs see


@dataclass(frozen=True)
class AidWeights:
    """Loss weights of the training aids; 0 switches one off."""

    read_out: float = 0.5  # row, column and box of visual tokens from inner layers
    visual_to_visual: float = 1.0  # penalty on attention from a visual token to other visual tokens
    text_to_background: float = 0.5  # penalty on attention from text to patches without an object
    target: float = 1.0  # attention target on the meant object's patches before the first coordinate


class ReadOuts(nn.Module):
    """Linear heads on inner layers, used in training only; not part of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Linear(HIDDEN, 2 * GRID)
        self.box = nn.Linear(HIDDEN, 4)


def soft_targets() -> Tensor:
    """[V, V]: one-hot rows, but a coordinate's row is a Gaussian of one bin around it."""
    table = torch.eye(len(VOCABULARY))
    bins = torch.arange(COORDINATE_BINS, dtype=torch.float32)
    soft = torch.exp(-0.5 * (bins[:, None] - bins) ** 2)
    span = slice(FIRST_COORDINATE_ID, FIRST_COORDINATE_ID + COORDINATE_BINS)
    table[span, span] = soft / soft.sum(-1, keepdim=True)
    return table


def decoder_loss(
    output: DecoderOutput,
    answers_BQA: Tensor,
    replies_RA: Tensor,
    read_outs: ReadOuts,
    owner_BN: Tensor,
    boxes_BO4: Tensor,
    table_VV: Tensor,
    weights: AidWeights,
    late: bool,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one step and what to show of it. `replies` answer the questions without an image; `late` selects the weights of the second part of the stage."""
    token_weights = torch.tensor(_LATE_TOKEN_WEIGHTS if late else _TOKEN_WEIGHTS)
    losses = -(table_VV[answers_BQA] * output.logits.log_softmax(-1)).sum(-1)
    answer = (losses.mean((0, 1)) * token_weights).sum() / _SCALE
    with torch.no_grad():
        span = slice(FIRST_COORDINATE_ID, FIRST_COORDINATE_ID + COORDINATE_BINS)
        guess = output.logits[:, :, FIRST_COORDINATE, span].argmax(-1) + FIRST_COORDINATE_ID
        near = ((guess - answers_BQA[:, :, FIRST_COORDINATE]).abs() <= 3).float().mean()
    assert output.alone_logits is not None
    alone = -(table_VV[replies_RA] * output.alone_logits.log_softmax(-1)).sum(-1).mean()
    answer = answer + _ALONE * alone
    metrics = {"x0": losses[:, :, FIRST_COORDINATE].mean().item(), "x0_near": near.item()}
    loss = answer
    if weights.read_out:
        place, box = _read_out_losses(output, read_outs, owner_BN, boxes_BO4, metrics)
        loss = loss + weights.read_out * (0.5 * place + 3.0 * box)
    others = torch.stack(output.visual_to_visual).mean()
    background = torch.stack(output.text_to_background).mean()
    assert output.target_mass is not None
    hit = output.target_mass
    background_weight = weights.text_to_background * (_LATE_BACKGROUND if late else 1.0)
    loss = loss + weights.visual_to_visual * others + background_weight * background
    loss = loss - weights.target * (hit + 1e-4).log().mean()
    metrics |= {
        "alone": alone.item(),
        "vv": others.item(),
        "tb": background.item(),
        "hit": hit.mean().item(),
        "loss": loss.item(),
    }
    return loss, metrics


def _read_out_losses(
    output: DecoderOutput, read_outs: ReadOuts, owner_BN: Tensor, boxes_BO4: Tensor, metrics: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of (row, column) for every visual token; smooth L1 of the own object's box for object patches."""
    states = output.visual_states[PLACE_LAYER]
    logits = read_outs.place(F.rms_norm(states, (HIDDEN,))).unflatten(-1, (2, GRID))
    patch = torch.arange(PATCHES)
    wanted = torch.stack([patch // GRID, patch % GRID], dim=-1).expand(len(owner_BN), -1, -1)
    place = F.cross_entropy(logits.flatten(0, 2), wanted.flatten())
    metrics["place"] = (logits.argmax(-1) == wanted).all(-1).float().mean().item()
    on_object = owner_BN != NO_OBJECT
    sample = torch.arange(len(owner_BN))[:, None].expand(-1, PATCHES)[on_object]
    truth = boxes_BO4[sample, owner_BN[on_object].long()] / IMAGE_SIZE
    guess = read_outs.box(F.rms_norm(output.visual_states[BOX_LAYER][on_object], (HIDDEN,)))
    metrics["box"] = (guess - truth).abs().mean().item() * IMAGE_SIZE
    return place, F.smooth_l1_loss(guess, truth, beta=0.05)
