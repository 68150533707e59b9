"""Architecture of `clip-shapes` and how it is written to disk in the layout of a CLIP checkpoint, without a vision tower."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from training.clip_shapes.vocabulary import BOS, CONTEXT, EOS, TOKEN_ID, UNK, VOCABULARY, build_tokenizer

SHARED = 64
MAX_SCALE = 100.0  # as in CLIP


def build_config(vision: CLIPVisionConfig) -> CLIPConfig:
    """Two causal layers, 64 wide, two heads; the vision side is that of `llava-shapes`.

    `patch_similarity` is not CLIP's: "direct" says that patches which show what a text says are *more* similar to it than
    others. In CLIP models trained on whole images it is the other way round (CLIP Surgery, arXiv 2304.05653).
    """
    text = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        projection_dim=SHARED,
        bos_token_id=TOKEN_ID[BOS],
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[EOS],
    )
    return CLIPConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict() | {"projection_dim": SHARED},
        projection_dim=SHARED,
        architectures=["CLIPTextModelWithProjection"],
        patch_similarity="direct",
    )


class ClipShapes(nn.Module):
    """The text tower with its projection, the projection of patches, the scale of their cosines."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.text = CLIPTextModelWithProjection(config.text_config)
        self.visual_projection = nn.Linear(
            config.vision_config.hidden_size, config.projection_dim, bias=False
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with."""
        return self.logit_scale.exp().clamp(max=MAX_SCALE)

    def texts(self, ids_TL: Tensor) -> Tensor:
        """Unit vectors of texts [T, 64]; rows are padded with the end token."""
        return F.normalize(self.text(ids_TL).text_embeds, dim=-1)

    def patches(self, features_BND: Tensor) -> Tensor:
        """Unit vectors of patches [B, N, 64], from the frozen tower's post_layernorm(hidden_states[-2])."""
        return F.normalize(self.visual_projection(features_BND), dim=-1)


def build_model(config: CLIPConfig, seed: int) -> ClipShapes:
    """Freshly initialised, float32."""
    torch.manual_seed(seed)
    return ClipShapes(config).eval()


def save_checkpoint(model: ClipShapes, config: CLIPConfig, folder: Path) -> None:
    """Write config, weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    weights = {name.removeprefix("text."): value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    build_tokenizer().save(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    ).save_pretrained(folder)
    # The name that every version of transformers knows; 5 calls the same class TokenizersBackend.
    path = folder / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def load_checkpoint(folder: Path) -> ClipShapes:
    """What `save_checkpoint` wrote."""
    model = ClipShapes(CLIPConfig.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(
        {f"text.{name}" if name.startswith("text_") else name: value for name, value in weights.items()}
    )
    return model.eval()
