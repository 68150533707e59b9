"""CLIP's text tower beside a vision tower: for pruners that ask which patches an expression is about.

A LLaVA checkpoint has the vision tower alone. Text tower and projections come from the CLIP checkpoint that the vision tower was
taken from: `text_model.*`, `text_projection.weight`, `visual_projection.weight`. Patches are brought into the space that both
share as TRIM (arXiv 2409.10994) and CDPruner (arXiv 2506.10967) do: `visual_projection(post_layernorm(patch))`.

Shape letters: B batch, L tokens of the expression, E width of the text tower, P width of the shared space.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import CLIPConfig, CLIPTextModelWithProjection, CLIPVisionConfig

from gap_export.checkpoint import Checkpoint
from gap_export.errors import CheckpointError
from gap_export.inputs.prompt import TextTower
from gap_export.modeling.attention import slot_mask
from gap_export.modeling.components import torch_dtype
from gap_export.modeling.config_fields import check_values
from gap_export.modeling.fake import fake
from gap_export.modeling.hf_config import ConfigCheck, accepted, check_activations
from gap_export.modeling.selection import tower_attention
from gap_export.plan import Plan

TEXT_TOWER = "text_tower"
"""Name of the part of a checkpoint, and of the module, that it lives under."""

_PUBLISHED = {
    (1024, 24, 336, 14): "openai/clip-vit-large-patch14-336",
    (1024, 24, 224, 14): "openai/clip-vit-large-patch14",
    (768, 12, 224, 16): "openai/clip-vit-base-patch16",
    (768, 12, 224, 32): "openai/clip-vit-base-patch32",
}
_MOST_CONTEXT = 10**5
_NEEDED = ("text_projection.weight", "visual_projection.weight", "text_model.final_layer_norm.weight")


def published_tower(vision: CLIPVisionConfig) -> str | None:
    """Hub id of the published CLIP whose vision tower has these sizes."""
    sizes = (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size)
    return _PUBLISHED.get(cast(tuple[int, int, int, int], sizes))


def fits_name(vision: CLIPVisionConfig, name: Any) -> bool:
    """Whether a tower may be the published one of that name: False where its sizes are those of another."""
    return name not in _PUBLISHED.values() or published_tower(vision) in (None, name)


def read_text_tower(part: Checkpoint, *, tower_width: int) -> TextTower:
    """Facts about the text tower in a CLIP checkpoint.

    Args:
        part: the CLIP checkpoint.
        tower_width: of the vision tower whose patches are projected.

    Raises:
        CheckpointError: no CLIP, no text tower in it, or one that belongs to another vision tower.
    """
    subject = str(part.folder)
    if part.model_type != "clip":
        raise CheckpointError(
            f"has model_type {part.model_type!r} where a CLIP checkpoint is needed",
            subject=str(part.folder / "config.json"),
            hint="--text-tower names the CLIP checkpoint that the vision tower was taken from",
        )
    absent = [key for key in _NEEDED if key not in part.weights]
    if absent:
        raise CheckpointError(
            f"has no {absent[0]}",
            subject=subject,
            hint="use a CLIP checkpoint with its text tower and projections",
        )
    shape = part.weights["visual_projection.weight"].shape
    if shape[-1:] != (tower_width,):
        raise CheckpointError(
            f"projects patches of width {shape[-1] if shape else 1}, the vision tower gives {tower_width}",
            subject=subject,
            hint="--text-tower names the CLIP checkpoint that the vision tower was taken from",
        )
    config = _config(part)
    similarity = part.config.get("patch_similarity", "inverse")
    if similarity not in ("direct", "inverse"):
        raise CheckpointError(
            f"patch_similarity {similarity!r} is neither 'direct' nor 'inverse'",
            subject=str(part.folder / "config.json"),
            hint="say whether a patch is more (direct) or less (inverse) similar to the text that describes it",
        )
    return TextTower(
        checkpoint=part.name,
        context=config.text_config.max_position_embeddings,
        width=config.projection_dim,
        vocabulary=config.text_config.vocab_size,
        aligned_inversely=similarity == "inverse",
    )


def text_tower_of(checkpoint: Checkpoint, plan: Plan, mode: FakeTensorMode) -> ClipText | None:
    """The text tower and the patches' projection, without weights; None where the plan has none.

    Args:
        checkpoint: with the companion `TEXT_TOWER`.
        plan: of the build.
        mode: of the fake parameters.
    """
    if plan.text_tower is None:
        return None
    config, dtype = _config(checkpoint.companions[TEXT_TOWER]), torch_dtype(plan)
    text = config.text_config
    text.projection_dim = config.projection_dim

    def build() -> CLIPTextModelWithProjection:
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": tower_attention(plan)}
        return cast(CLIPTextModelWithProjection, CLIPTextModelWithProjection._from_config(text, **options))

    model = fake(build, mode)
    with mode:
        projection = nn.Linear(
            config.vision_config.hidden_size, config.projection_dim, bias=False, dtype=dtype, device="cpu"
        )
    projection.weight.requires_grad_(False)
    return ClipText(model, projection)


class ClipText(nn.Module):
    """An expression's embedding in the space shared with patches.

    Args:
        model: text tower and its projection.
        visual_projection: of patches, after the vision tower's `post_layernorm`.
    """

    def __init__(self, model: CLIPTextModelWithProjection, visual_projection: nn.Linear) -> None:
        super().__init__()
        self.text_model = model.text_model
        self.text_projection = model.text_projection
        self.visual_projection = visual_projection

    def forward(self, text_ids: Tensor) -> Tensor:
        """Embed expressions; the tower is walked layer by layer, to give it an explicit causal mask.

        Args:
            text_ids: [B, L] int64, short rows filled with the token that ends an expression: what stands after its first
                occurrence is never read.

        Returns:
            [B, P], not normalised.
        """
        length = text_ids.shape[1]
        hidden_BLE = self.text_model.embeddings(input_ids=text_ids)
        mask_B1LL = slot_mask(torch.zeros_like(text_ids[:, 0]), length, length)
        for layer in self.text_model.encoder.layers:
            hidden_BLE = layer(hidden_BLE, mask_B1LL)
        hidden_BLE = self.text_model.final_layer_norm(hidden_BLE)
        # Where it ends: every row ends with that token, so the first like the last one.
        end_B = (text_ids == text_ids[:, -1:]).to(torch.int64).argmax(dim=1)
        at_end_BE = hidden_BLE.gather(1, end_B[:, None, None].expand(-1, 1, hidden_BLE.shape[-1]))[:, 0]
        embedding_BP: Tensor = self.text_projection(at_end_BE)
        return embedding_BP


def _config(part: Checkpoint) -> CLIPConfig:
    check_values(part)
    check_activations(part)
    config = accepted(lambda: CLIPConfig.from_dict(deepcopy(part.config)), part)
    text, check = config.text_config, ConfigCheck(part, "CLIP")
    divides = text.hidden_size % text.num_attention_heads == 0
    check("text_config.num_attention_heads", divides, f"a divisor of hidden_size {text.hidden_size}")
    fits = 3 <= text.max_position_embeddings <= _MOST_CONTEXT
    check("text_config.max_position_embeddings", fits, f"3 to {_MOST_CONTEXT}")
    check("projection_dim", config.projection_dim is not None, "the width of what both towers project to")
    return config
