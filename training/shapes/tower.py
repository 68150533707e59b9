"""Stage 0: the CLIP tower learns to describe patches, and its CLS token to say what is in the image.

Two properties are built in here that the figures with pruned tokens depend on. (1) The position table is shifted by a
random number of rows and columns, with wrap-around, for every image: neighbours can be told apart, absolute place
cannot, so location has to reach the answer through the decoder's position ids. (2) CLS is trained to list colour and
shape of all objects, from the very layer that feeds the projector; its attention finds the objects by itself.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from gap_export.boxes.scenes import COLOURS, SHAPES, SIZES
from training.shapes.attention import ExpAttend
from training.shapes.data import NO_OBJECT
from training.shapes.model import GRID, HIDDEN, IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, PATCH_SIZE, PATCHES


class TowerHeads(nn.Module):
    """Linear read-outs used in training only; they are not part of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(HIDDEN, 1 + len(COLOURS) + len(SHAPES) + len(SIZES) + 4)
        self.present = nn.Linear(HIDDEN, len(COLOURS) * len(SHAPES))
        self.present_pooled = nn.Linear(HIDDEN, len(COLOURS) * len(SHAPES))


def initialise_positions(model: LlavaForConditionalGeneration, generator: torch.Generator) -> None:
    """Fill the position table with a random mixture of the grid's periodic harmonics."""
    steps = torch.arange(GRID, dtype=torch.float32)
    waves = []
    for k in range(1, GRID // 2 + 1):
        waves += [torch.cos(2 * math.pi * k * steps / GRID), torch.sin(2 * math.pi * k * steps / GRID)]
    wave = torch.stack(waves, dim=-1)  # [12, 12]
    by_row = wave[:, None].expand(GRID, GRID, -1)
    by_column = wave[None].expand(GRID, GRID, -1)
    table = torch.cat([by_row, by_column], dim=-1).reshape(PATCHES, -1)
    mixing = torch.randn(table.shape[-1], HIDDEN, generator=generator) * 0.3 / math.sqrt(GRID)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = table @ mixing


def shifted_positions(shift_B2: Tensor) -> Tensor:
    """Row of the position table for every patch after a wrap-around shift by (rows, columns): [B, 144]."""
    rows = (torch.arange(GRID)[None, :, None] + shift_B2[:, :1, None]) % GRID
    columns = (torch.arange(GRID)[None, None, :] + shift_B2[:, 1:, None]) % GRID
    return (rows * GRID + columns).reshape(len(shift_B2), PATCHES) + 1


def pixel_patches(pixels_BHWC: Tensor) -> Tensor:
    """uint8 images as normalised rows for the patch embedding: [B, 144, 192] bfloat16, channel-major."""
    x = pixels_BHWC.view(-1, GRID, PATCH_SIZE, GRID, PATCH_SIZE, 3).permute(0, 1, 3, 5, 2, 4)
    x = x.reshape(len(pixels_BHWC), PATCHES, -1)
    scale = 1 / (255 * IMAGE_STD[0])
    return x.float().mul_(scale).sub_(IMAGE_MEAN[0] / IMAGE_STD[0]).bfloat16()


def tower_forward(
    model: LlavaForConditionalGeneration, pixels_BHWC: Tensor, shift_B2: Tensor, pooled: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The features that LLaVA takes (`hidden_states[-2]`), CLS first: [B, 145, 128] float32, and the pooled CLS."""
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    patches = F.linear(
        pixel_patches(pixels_BHWC), embeddings.patch_embedding.weight.flatten(1).bfloat16()
    ).float()
    table = embeddings.position_embedding.weight
    patches = patches + F.embedding(shifted_positions(shift_B2), table)
    cls = (embeddings.class_embedding + table[0]).expand(len(patches), 1, -1)
    x = _layer_norm(torch.cat([cls, patches], dim=1), tower.pre_layrnorm)
    for layer in tower.encoder.layers[:-1]:
        x = _layer(layer, x, x)
    if not pooled:
        return x, None
    last = _layer(tower.encoder.layers[-1], x[:, :1], x)
    return x, _layer_norm(last[:, 0], tower.post_layernorm)


def _layer_norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), module.weight, module.bias, module.eps)


def _linear(x: Tensor, module: nn.Linear) -> Tensor:
    return F.linear(x, module.weight.bfloat16(), module.bias.bfloat16())


def _layer(layer: nn.Module, x_BMD: Tensor, memory_BND: Tensor) -> Tensor:
    """One encoder layer; the first M rows of `memory` are the rows of `x` that are wanted."""
    attention = layer.self_attn
    heads, dim, batch, wanted = attention.num_heads, attention.head_dim, len(x_BMD), x_BMD.shape[1]
    normed = _layer_norm(memory_BND, layer.layer_norm1).bfloat16()
    q = (_linear(normed[:, :wanted], attention.q_proj) * attention.scale).view(batch, wanted, heads, dim)
    k = _linear(normed, attention.k_proj).view(batch, -1, heads, dim).transpose(1, 2).contiguous()
    v = _linear(normed, attention.v_proj).view(batch, -1, heads, dim).transpose(1, 2)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    mixed = ExpAttend.apply(q.transpose(1, 2).contiguous(), k, v, None)
    mixed = mixed[..., :dim] / mixed[..., dim:]
    x = x_BMD + _linear(mixed.transpose(1, 2).reshape(batch, wanted, -1), attention.out_proj)
    hidden = F.gelu(_linear(_layer_norm(x, layer.layer_norm2).bfloat16(), layer.mlp.fc1))
    return x + _linear(hidden, layer.mlp.fc2)


def tower_loss(
    heads: TowerHeads,
    states_BTD: Tensor,
    pooled_BD: Tensor,
    owner_BN: Tensor,
    boxes_BO4: Tensor,
    kinds_BO3: Tensor,
    counts_B: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """Dense losses on the patches and the list of what is present on CLS. Boxes in pixels; returns loss and metrics."""
    patches = heads.patch(states_BTD[:, 1:])
    objectness, colour, shape, size, edges = patches.split(
        [1, len(COLOURS), len(SHAPES), len(SIZES), 4], dim=-1
    )
    on_object = owner_BN != NO_OBJECT
    loss_object = F.binary_cross_entropy_with_logits(objectness[..., 0], on_object.float())
    index = owner_BN[on_object].long()
    sample = torch.arange(len(owner_BN))[:, None].expand(-1, PATCHES)[on_object]
    kind = kinds_BO3[sample, index].long()
    loss_shape = F.cross_entropy(shape[on_object], kind[:, 0])
    loss_colour = F.cross_entropy(colour[on_object], kind[:, 1])
    loss_size = F.cross_entropy(size[on_object], kind[:, 2])
    wanted = relative_edges(
        boxes_BO4[sample, index], torch.arange(PATCHES).expand(len(owner_BN), -1)[on_object]
    )
    loss_edges = F.smooth_l1_loss(edges[on_object], wanted, beta=0.1)
    present = presence(kinds_BO3, counts_B)
    loss_cls = F.binary_cross_entropy_with_logits(heads.present(states_BTD[:, 0]), present)
    loss_pooled = F.binary_cross_entropy_with_logits(heads.present_pooled(pooled_BD), present)
    loss = (
        loss_object + loss_colour + loss_shape + loss_size + 4 * loss_edges + 3 * loss_cls + 1.5 * loss_pooled
    )
    metrics = {
        "loss": loss.item(),
        "shape": (shape[on_object].argmax(-1) == kind[:, 0]).float().mean().item(),
        "colour": (colour[on_object].argmax(-1) == kind[:, 1]).float().mean().item(),
        "size": (size[on_object].argmax(-1) == kind[:, 2]).float().mean().item(),
        "edge_px": ((edges[on_object] - wanted).abs().mean() * 16).item(),
        "cls": loss_cls.item(),
    }
    return loss, metrics


def relative_edges(boxes_n4: Tensor, patch_n: Tensor) -> Tensor:
    """Distances from a patch's centre to its object's edges (left, top, right, bottom), in units of 16 pixels."""
    x = (patch_n % GRID + 0.5) * PATCH_SIZE
    y = (patch_n // GRID + 0.5) * PATCH_SIZE
    left, top, right, bottom = boxes_n4.unbind(-1)
    return torch.stack([x - left, y - top, right - x, bottom - y], dim=-1) / 16


def absolute_boxes(boxes: Tensor) -> Tensor:
    """Boxes in pixels as fractions of the image."""
    return boxes / IMAGE_SIZE


def presence(kinds_BO3: Tensor, counts_B: Tensor) -> Tensor:
    """Which of the colour-shape pairs occur: [B, 24] of 0 and 1."""
    pair = kinds_BO3[..., 1].long() * len(SHAPES) + kinds_BO3[..., 0].long()
    exists = torch.arange(kinds_BO3.shape[1]) < counts_B[:, None]
    table = torch.zeros(len(counts_B), len(COLOURS) * len(SHAPES) + 1)
    return table.scatter_(1, torch.where(exists, pair, table.shape[1] - 1), 1.0)[:, :-1]
