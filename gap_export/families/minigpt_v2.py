"""MiniGPT-v2 (arXiv 2310.09478): EVA-CLIP at 448 pixels, four neighbours to a token, Llama-2-7b-chat with low-rank updates.

Facts: a checkpoint is a `.pth` with what was trained: `llama_proj`, and rank-64 updates (alpha 16) of q and v; tower and language
model lie beside it. The tower's output goes through `ln_vision`, loses its class token, and every four patches that follow each other
in a row become one token: 32 rows of 8. What scores a patch scores a token by the mean over its four; pruners that merge add up
projected tokens. Images are stretched,
boxes are `{<x1><y1><x2><y2>}` in hundredths of width and height. The prompt begins with two BOS: one that it spells, one that the
tokenizer adds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig
from typing_extensions import override

from gap_export import prune
from gap_export.bundle.manifest import BoxFormat, ModelSpec
from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.derived import with_low_rank
from gap_export.checkpoint.safetensors import Derived
from gap_export.checkpoint.tokenizers import slow_tokenizer, token_id, with_placeholder
from gap_export.checkpoint.weight_map import Prefixes
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families import frames
from gap_export.families.base import Companion, Family
from gap_export.inputs.layouts import SquareLayout
from gap_export.inputs.prompt import TextTower
from gap_export.modeling import config_fields, hf_config, selection
from gap_export.modeling.attention import IMPLEMENTATION
from gap_export.modeling.clip import OPENAI_MEAN, OPENAI_STD
from gap_export.modeling.components import ModelParts, square_images, torch_dtype
from gap_export.modeling.eva import EvaSizes, EvaTower, eva_sizes
from gap_export.modeling.fake import fake, fake_mode
from gap_export.modeling.layers import LayerStack
from gap_export.modeling.text_embedding import embedding_for, with_text
from gap_export.plan import Plan
from gap_export.recipe.recipe import Recipe

_QUESTION = "[refer] give me the location of {expression}"
GROUNDING_PROMPT = f"<s>[INST] <Img><ImageHere></Img> {_QUESTION} [/INST]"
PLACEHOLDER, END = "<ImageHere>", "</s>"
SIZE, GROUP = 448, 4
RANK, ALPHA = 64, 16

_TOWER, _BASE, _LOW_RANK = "vision_tower/", "base/", "llama_model.base_model.model."
_SPELLINGS = ("lora_{}.weight", "lora_{}.default.weight")
"""Of updates, by older and newer versions of peft."""


@dataclass(frozen=True)
class MiniGptConfig:
    """What there is in the place of a config.json.

    Attributes:
        text_config: of the language model.
        eva: sizes of the tower.
        image_token_id: of the placeholder: the first id after those of the tokenizer.
        tie_word_embeddings: whether the head is the token embedding; `text_config` may say so too.
    """

    text_config: LlamaConfig
    eva: EvaSizes
    image_token_id: int
    tie_word_embeddings: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the visual tokens."""
        return self.side, self.side // GROUP

    @property
    def side(self) -> int:
        """Patches along a side of the image."""
        return SIZE // self.eva.patch


class MiniGpt(Family):
    """MiniGPT-v2."""

    config: MiniGptConfig
    frame = frames.MINIGPT_V2
    grounding_question = _QUESTION
    grounding_prompt = GROUNDING_PROMPT
    placeholder = PLACEHOLDER
    prefixes: ClassVar[Prefixes] = {
        "vision_tower.": (_TOWER,),
        "ln_vision.": ("ln_vision.",),
        "multi_modal_projector.": ("llama_proj.",),
        "language_model.": (f"{_BASE}model.",),
        "lm_head.": (f"{_BASE}lm_head.",),
    }
    # What EVA-CLIP was trained with besides, and blocks above those that are used.
    unused_weights = rf"{re.escape(_LOW_RANK)}|{_TOWER}(norm|fc_norm|head|lm_head|mask_token|blocks\.39)\b"

    @staticmethod
    @override
    def companions(checkpoint: Checkpoint) -> tuple[Companion, ...]:
        return (
            Companion("vision_tower", "eva_vit_g.pth", "vision tower"),
            Companion("base", "meta-llama/Llama-2-7b-chat-hf", "language model"),
        )

    @override
    def resolve_weights(self, checkpoint: Checkpoint) -> Checkpoint:
        changed: dict[str, Any] = {}
        for key in checkpoint.weights:
            found = re.fullmatch(rf"{re.escape(_LOW_RANK)}(.+\.)lora_A(\.default)?\.weight", key)
            if found:
                own = f"{_BASE}{found[1]}weight"
                changed[own] = with_low_rank(
                    checkpoint, own, key, key.replace("lora_A", "lora_B"), rank=RANK, scale=ALPHA / RANK
                )
        if not changed:
            raise CheckpointError(
                f"has no low-rank updates ({_LOW_RANK}...{_SPELLINGS[0].format('A')})",
                subject=checkpoint.name,
                hint="name the checkpoint of MiniGPT-v2's third stage, or its demo's",
            )
        table = checkpoint.stored(f"{_TOWER}pos_embed")
        side = SIZE // eva_sizes(checkpoint, _TOWER).patch
        trained = round((table.shape[1] - 1) ** 0.5) if len(table.shape) == 3 and table.shape[1] > 1 else 0
        if table.shape[:2] != (1, 1 + trained * trained) or not trained:
            raise CheckpointError(
                f"has a pos_embed of shape {list(table.shape)}, which is no square of patches behind a class token",
                subject=str(table.file),
                hint="give EVA-CLIP's eva_vit_g.pth",
            )
        if trained != side:
            changed[f"{_TOWER}pos_embed"] = Derived(
                (1, 1 + side * side, table.shape[2]),
                (table,),
                lambda stored, rows: spread(stored[0], side)[rows],
            )
        return checkpoint.with_weights(changed)

    @override
    def check_fields(self) -> tuple[str, ...]:
        return config_fields.check_companion_fields(self.checkpoint.companions["base"], config_fields.LLAMA)

    @property
    @override
    def decoder_checkpoint(self) -> Checkpoint:
        return self.checkpoint.companions["base"]

    @override
    def read_config(self) -> MiniGptConfig:
        base = self.checkpoint.companions["base"]
        if base.model_type != "llama":
            raise CheckpointError(
                f"has model_type {base.model_type!r} where a Llama is needed",
                subject=str(base.folder / "config.json"),
                hint="--base names the language model: meta-llama/Llama-2-7b-chat-hf",
            )
        return MiniGptConfig(
            text_config=hf_config.llama_config(base),
            eva=eva_sizes(self.checkpoint, _TOWER),
            image_token_id=slow_tokenizer(base).get_vocab_size(),
        )

    @override
    def tokenizer(self) -> Tokenizer:
        found = slow_tokenizer(self.checkpoint.companions["base"])
        return with_placeholder(found, PLACEHOLDER, self.image_token_id)

    @property
    @override
    def end_tokens(self) -> tuple[int, ...]:
        return (token_id(slow_tokenizer(self.checkpoint.companions["base"]), END),)

    @override
    def assumptions(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        return ()  # the end is the tokenizer's, whatever files say

    @override
    def spec(self, recipe: Recipe) -> ModelSpec:
        rows, columns = self.config.grid
        return ModelSpec(
            **hf_config.decoder_sizes(self.config.text_config),
            visual_tokens=rows * columns,
            grid=(rows, columns),
            missing_features=self.row.missing_features,
        )

    @override
    def layout(self, recipe: Recipe) -> SquareLayout:
        return SquareLayout(size=SIZE, fit="stretch", background=(0, 0, 0), mean=OPENAI_MEAN, std=OPENAI_STD)

    @override
    def box(self, recipe: Recipe) -> BoxFormat:
        if recipe.fit not in (None, "stretch"):
            raise RecipeError(
                "is not how the model was trained: it sees images stretched to a square",
                subject=f"fit: {recipe.fit}",
                hint="leave it out",
            )
        return self.row.box

    @override
    def text_tower(self, companion: Checkpoint) -> TextTower:
        raise CheckpointError(
            "belongs to another vision tower: MiniGPT-v2 sees through EVA-CLIP, which is published without its text tower",
            subject=companion.name,
            hint="leave --text-tower out: expressions are read by the decoder's own token embedding",
        )

    @override
    def model_parts(self, spec: ModelSpec, plan: Plan) -> ModelParts:
        config, mode, dtype = self.config, fake_mode(), torch_dtype(plan)
        text, width, tokens = config.text_config, config.eva.width, 1 + config.side**2
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": IMPLEMENTATION}
        language_model = fake(lambda: AutoModel.from_config(text, **options), mode)
        trained_norm = "ln_vision.weight" in self.checkpoint.weights
        modules: dict[str, nn.Module] = {
            "vision_tower": fake(
                lambda: EvaTower(config.eva, tokens, selection.tower_attention(plan)).to(dtype), mode
            ),
            # Nobody trained it: where the checkpoint has no weights for it, it only normalises.
            "ln_vision": fake(lambda: nn.LayerNorm(width, elementwise_affine=trained_norm), mode),
            "multi_modal_projector": fake(
                lambda: nn.Linear(GROUP * width, text.hidden_size, dtype=dtype), mode
            ),
            "language_model": language_model,
            "lm_head": fake(
                lambda: nn.Linear(text.hidden_size, text.vocab_size, bias=False, dtype=dtype), mode
            ),
        }
        self.check_weights(f"{name}.{key}" for name, module in modules.items() for key in module.state_dict())
        return ModelParts(
            vision=MiniGptVision(modules, plan, grid=config.grid),
            vision_inputs=(square_images(plan, SIZE),),
            language_model=language_model,
            lm_head=modules["lm_head"],
            vision_layers=LayerStack("vision_tower.blocks", (range(config.eva.blocks),)),
        )


def spread(table_1TE: NDArray[Any], side: int) -> NDArray[np.float32]:
    """Learned positions of a square of patches, for a square with more of them: bicubic, the class token's as it is."""
    table = torch.from_numpy(np.array(table_1TE, np.float32))
    own = round((table.shape[1] - 1) ** 0.5)
    grid_1EHW = table[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
    larger = nn.functional.interpolate(grid_1EHW, size=(side, side), mode="bicubic", align_corners=False)
    spread_1TE: NDArray[np.float32] = torch.cat(
        [table[:, :1], larger.permute(0, 2, 3, 1).flatten(1, 2)], 1
    ).numpy()
    return spread_1TE


class MiniGptVision(nn.Module):
    """Tower, norm, groups of four, pruner, projector.

    Args:
        modules: without weights, by the names on the left of `prefixes`.
        plan: of the build.
        grid: (rows, columns) of the tokens.
    """

    def __init__(self, modules: dict[str, nn.Module], plan: Plan, *, grid: tuple[int, int]) -> None:
        super().__init__()
        self.vision_tower, self.ln_vision = modules["vision_tower"], modules["ln_vision"]
        self.multi_modal_projector = modules["multi_modal_projector"]
        self._plan, self._grid = plan, grid
        language_model: Any = modules["language_model"]
        self.embed_tokens = embedding_for(plan, language_model.get_input_embeddings())

    def forward(
        self, pixel_values: Tensor, text_ids: Tensor | None = None, keep_count: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Encode and prune.

        Args:
            pixel_values: [B, 3, size, size] float32.
            text_ids: [B, L] int64 of the expressions, for pruners that look at them.
            keep_count: K, where requests choose it.

        Returns:
            visual_embeds [B, K, H], kept_indices [B, K] int64; where images differ in how many they keep, kept_counts [B]
            int64, rows being padded to the bound.
        """
        tower: Any = self.vision_tower
        out_BTE, into_BTE = tower(pixel_values.to(tower.cls_token.dtype))
        normed_BTE = self.ln_vision(out_BTE.float()).to(out_BTE.dtype)
        tokens_BNE = normed_BTE[:, 1:].unflatten(1, (-1, GROUP)).flatten(2)
        last = tower.blocks[-1]
        query_BATD, keys_BATD, _ = last.attn.split(last.norm1(into_BTE))
        projected_BNH, query_BAD = self.multi_modal_projector(tokens_BNE), query_BATD[:, :, 0]
        query_B1E, keys_B1TE = query_BAD.flatten(1)[:, None], keys_BATD.transpose(1, 2).flatten(2)[:, None]

        def mean_of_group(patches: Tensor) -> Tensor:
            """A token is four patches."""
            means: Tensor = patches.unflatten(1, (-1, GROUP)).mean(dim=2)
            return means

        features = prune.VisionFeatures(
            patches=tokens_BNE,
            grid=self._grid,
            attention=lambda: mean_of_group(prune.class_attention(query_BAD, keys_BATD)),
            mean_keys=lambda: mean_of_group(prune.mean_keys(keys_BATD)),
            full_width_attention=lambda: mean_of_group(prune.class_attention(query_B1E, keys_B1TE)) * GROUP,
            full_width_keys=lambda: mean_of_group(keys_B1TE[:, 0, 1:].float()),
            projected=projected_BNH,
            embeds=projected_BNH,
        )
        features = with_text(features, self.embed_tokens, text_ids)
        embeds_BKH, selected = selection.select_and_project(
            self._plan, features, keep_count, self.multi_modal_projector
        )
        return selection.outputs(embeds_BKH, selected)
