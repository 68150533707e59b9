"""A CLIP tower, a projector, a Llama: what LLaVA-1.5, in both layouts it is published in, and Shikra are made of.

The modules of transformers are traced unchanged. A family says which sizes they have, which projector stands between them, and
where its checkpoints keep what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, PretrainedConfig

from gap_export.bundle.manifest import ModelSpec
from gap_export.bundle.spec import Component, TensorSpec
from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.weight_map import Prefixes, check_known, find_key, with_shared_table
from gap_export.modeling import assembly
from gap_export.modeling.attention import IMPLEMENTATION
from gap_export.modeling.clip import ClipVision
from gap_export.modeling.clip_text import TEXT_TOWER, hollow_text_tower, published_tower
from gap_export.modeling.fake import fake_mode, hollow
from gap_export.modeling.selection import tower_attention
from gap_export.plan import Plan


@dataclass(frozen=True)
class ClipLlama:
    """One model.

    Attributes:
        checkpoint: joined by its parts.
        vision: config of the tower.
        text: config of the decoder.
        projector: constructs the projector, from the tower's width to the decoder's.
        feature_layer: how many layers of the tower are run.
        image_token_id: id of the placeholder.
        prefixes: where the checkpoint keeps `vision_tower.`, `multi_modal_projector.`, `language_model.` and `lm_head.`.
        ignored: pattern of keys that are known and not used.
    """

    checkpoint: Checkpoint
    vision: CLIPVisionConfig
    text: PretrainedConfig
    projector: Callable[[], nn.Module]
    feature_layer: int
    image_token_id: int
    prefixes: Prefixes
    ignored: str = r"(?!)"

    @property
    def side(self) -> int:
        """Patches along a side of the image."""
        return int(self.vision.image_size) // int(self.vision.patch_size)

    def facts(self) -> ModelSpec:
        """See `Family.facts`."""
        text: Any = self.text
        return ModelSpec(
            hidden_size=text.hidden_size,
            layers=text.num_hidden_layers,
            attention_heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size,
            visual_tokens=self.side**2,
            grid=(self.side, self.side),
            max_positions=text.max_position_embeddings,
            missing_features=()
            if self.feature_layer < self.vision.num_hidden_layers
            else ("following_layer",),
            published_tower=published_tower(self.vision),
        )

    def components(self, sizes: ModelSpec, plan: Plan) -> list[Component]:
        """See `Family.components`."""
        dtype = assembly.torch_dtype(plan)
        mode = fake_mode()
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": IMPLEMENTATION}
        attention = tower_attention(plan)
        towers = {**options, "attn_implementation": attention}
        tower = hollow(lambda: AutoModel.from_config(self.vision, **towers), mode)
        language_model = hollow(lambda: AutoModel.from_config(self.text, **options), mode)
        projector = hollow(lambda: self.projector().to(dtype), mode)
        lm_head = hollow(lambda: self._lm_head(dtype), mode)
        modules = {
            "vision_tower": tower,
            "multi_modal_projector": projector,
            "language_model": language_model,
            "lm_head": lm_head,
        }
        tied = bool(getattr(self.text, "tie_word_embeddings", False))
        prefixes = {
            **with_shared_table(self.prefixes, tied=tied),
            f"{TEXT_TOWER}.": [f"{TEXT_TOWER}/"],
        }
        named = (
            f"{name}.{parameter}" for name, module in modules.items() for parameter in module.state_dict()
        )
        check_known(self.checkpoint, named, prefixes, ignored=rf"{TEXT_TOWER}/|{self.ignored}")
        text = None
        if plan.text_tower is not None:
            text = hollow_text_tower(self.checkpoint.parts[TEXT_TOWER], dtype, mode, attention)
        size = self.vision.image_size
        pieces = assembly.Pieces(
            vision=ClipVision(tower, projector, plan, feature_layer=self.feature_layer, text=text),
            vision_inputs=(
                TensorSpec(
                    name="pixel_values", dtype="float32", shape=(assembly.batch_dim(plan), 3, size, size)
                ),
            ),
            language_model=language_model,
            lm_head=lm_head,
            image_token_id=self.image_token_id,
            weight_key=lambda name: find_key(self.checkpoint, name, prefixes),
        )
        return assembly.components(self.checkpoint.folder, sizes, plan, pieces)

    def _lm_head(self, dtype: torch.dtype) -> nn.Linear:
        text: Any = self.text
        return nn.Linear(text.hidden_size, text.vocab_size, bias=False, dtype=dtype)
