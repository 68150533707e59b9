"""Models that see one square: LLaVA-1.5 in both layouts, Shikra, MiniGPT-v2."""

from __future__ import annotations

from pathlib import Path

from gap_export.checkpoint import Checkpoint, open_checkpoint
from tests.families.published import towers
from tests.families.published.decoders import SIZES, decoder_config, decoder_shapes
from tests.families.published.files import write
from tests.families.published.keys import Shapes, linear, named, new_names
from tests.families.small_llama import write_tokenizer


def llava(folder: Path, kind: str, *, new: bool) -> Checkpoint:
    """As Hugging Face publishes it."""
    width, decoder = SIZES[kind]["width"], decoder_shapes(kind, 32064)
    others = {
        **named("vision_tower.vision_model.", towers.clip(336)),
        **linear("multi_modal_projector.linear_1", width, 1024),
        **linear("multi_modal_projector.linear_2", width, width),
    }
    config = {
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": decoder_config(kind, 32064),
        "vision_config": {**towers.CLIP_CONFIG, "image_size": 336},
    }
    shapes = new_names(decoder, others) if new else {**named("language_model.", decoder), **others}
    return open_checkpoint(write(folder / "checkpoint", config, shapes))


def llava_original(folder: Path, kind: str, *, tower_inside: bool) -> Checkpoint:
    """As its authors publish it."""
    width = SIZES[kind]["width"]
    shapes = {
        **decoder_shapes(kind, 32000),
        **linear("model.mm_projector.0", width, 1024),
        **linear("model.mm_projector.2", width, width),
    }
    if tower_inside:
        shapes |= named("model.vision_tower.vision_tower.vision_model.", towers.clip(336))
    config = decoder_config(
        kind,
        32000,
        model_type="llava",
        mm_vision_tower="openai/clip-vit-large-patch14-336",
        mm_projector_type="mlp2x_gelu",
    )
    target = write(folder / "checkpoint", config, shapes)
    write_tokenizer(target, [])
    return open_checkpoint(target).with_companion("vision_tower", _clip(folder, 336))


def shikra(folder: Path) -> Checkpoint:
    """A delta over LLaMA-7B, with three tokens more than that."""
    shapes = {
        **decoder_shapes("llama-7b", 32003),
        **linear("model.mm_projector", 4096, 1024),
        **{f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (64,) for n in range(32)},
    }
    config = decoder_config("llama-7b", 32003, model_type="shikra")
    target = write(folder / "shikra-7b-delta-v1", config, shapes)
    write_tokenizer(target, ["<im_patch>", "<im_start>", "<im_end>"])
    checkpoint = open_checkpoint(target).with_companion("vision_tower", _clip(folder, 224))
    return checkpoint.with_companion("base", open_checkpoint(_llama(folder / "llama-7b")))


def minigpt_v2(folder: Path) -> Checkpoint:
    """Trained parameters as the code names them; the tower has a block too many."""
    own: Shapes = linear("llama_proj", 4096, 4 * 1408)
    for n in range(32):
        for part in "qv":
            name = f"llama_model.base_model.model.model.layers.{n}.self_attn.{part}_proj"
            own |= {f"{name}.lora_A.weight": (64, 4096), f"{name}.lora_B.weight": (4096, 64)}
    base = _llama(folder / "llama-2")
    write_tokenizer(base, ["<Img>", "</Img>"])
    trained = open_checkpoint(write(folder / "own", {}, own))
    tower = open_checkpoint(write(folder / "eva", {}, towers.eva()))
    checkpoint = Checkpoint(trained.folder, "minigpt", {}, trained.weights)
    return checkpoint.with_companion("vision_tower", tower).with_companion("base", open_checkpoint(base))


def _llama(folder: Path) -> Path:
    return write(folder, decoder_config("llama-7b", 32000), decoder_shapes("llama-7b", 32000))


def _clip(folder: Path, image: int) -> Checkpoint:
    """The whole of CLIP as published: the text tower is known, and not needed."""
    shapes: Shapes = {
        **named("vision_model.", towers.clip(image)),
        "text_projection.weight": (768, 768),
        "visual_projection.weight": (768, 1024),
        "logit_scale": (),
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "vision_model.embeddings.position_ids": (1, 577),
    }
    config = {"model_type": "clip", "vision_config": {**towers.CLIP_CONFIG, "image_size": image}}
    return open_checkpoint(write(folder / "clip", config, shapes))
