"""Stand-in checkpoints: LLaVA-1.5's layout, key names, sizes and config with random fp16 weights.

What an export costs depends on shapes, names and bytes, not on values, so a stand-in measures it without a download.
Weights are streamed to disk from one block of random numbers; the whole checkpoint is never in memory.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

IMAGE_TOKEN = 32000

# As published in llava-hf/llava-1.5-7b-hf, with the defaults it leaves out written out.
LLAVA_7B: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": IMAGE_TOKEN,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}

_PREPROCESSOR = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}

# Name in transformers' module tree -> name in the published files.
_HUB_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
_SHARD_BYTES = 5 * 10**9
_BLOCK_ELEMENTS = 2**24 - 3  # odd, so that the block falls differently on every row and every matrix
_WEIGHT_STD = 0.02
_ELEMENT_BYTES = 2

Shapes = dict[str, tuple[int, ...]]


def truncated(config: dict[str, Any], *, text_layers: int, vision_layers: int) -> dict[str, Any]:
    """The same widths with fewer layers."""
    return {
        **config,
        "text_config": {**config["text_config"], "num_hidden_layers": text_layers},
        "vision_config": {**config["vision_config"], "num_hidden_layers": vision_layers},
    }


def ensure_checkpoint(folder: Path, config: dict[str, Any]) -> tuple[Path, int]:
    """Write a checkpoint folder, or take the one that an earlier run left there.

    Returns:
        (folder, bytes of its weights).

    Raises:
        SystemExit: something else is in the way, or the disk has no room.
    """
    if not folder.exists():
        _write_checkpoint(folder, config)
    elif json.loads((folder / "config.json").read_text()) != config:
        raise SystemExit(f"{folder} holds another checkpoint; remove it or choose another --scratch")
    return folder, sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))


def _write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Everything lands under another name first: a folder of the right name is always complete."""
    scratch = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (scratch / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=2) + "\n")
    _write_tokenizer(scratch / "tokenizer.json")

    shards = _shards(_published_shapes(scratch))
    needed, free = sum(map(_bytes_of, shards)), shutil.disk_usage(scratch).free
    if needed > free:
        raise SystemExit(f"{folder} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    numbers = np.random.default_rng(0).standard_normal(_BLOCK_ELEMENTS, np.float32) * _WEIGHT_STD
    block = numbers.astype(np.float16)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shapes in zip(names, shards, strict=True):
        with (scratch / name).open("wb") as out:
            _write_shard(out, shapes, block)
    index = {
        "metadata": {"total_size": needed},
        "weight_map": {key: name for name, shapes in zip(names, shards, strict=True) for key in shapes},
    }
    (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    scratch.rename(folder)


def _published_shapes(folder: Path) -> Shapes:
    """Keys and shapes, from transformers' own modules on the meta device."""
    import torch
    from transformers import AutoConfig, LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(folder))
    shapes: Shapes = {}
    for name, parameter in model.named_parameters():
        prefix = next(prefix for prefix in _HUB_NAMES if name.startswith(prefix))
        shapes[_HUB_NAMES[prefix] + name.removeprefix(prefix)] = tuple(parameter.shape)
    return shapes


def _shards(shapes: Shapes) -> list[Shapes]:
    shards: list[Shapes] = [{}]
    for key, shape in shapes.items():
        if shards[-1] and _bytes_of({**shards[-1], key: shape}) > _SHARD_BYTES:
            shards.append({})
        shards[-1][key] = shape
    return shards


def _bytes_of(shapes: Shapes) -> int:
    return sum(_ELEMENT_BYTES * int(np.prod(shape)) for shape in shapes.values())


def _write_shard(out: BinaryIO, shapes: Shapes, block: NDArray[np.float16]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + _bytes_of({key: shape})
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    position = 0
    for key, shape in shapes.items():
        left = int(np.prod(shape))
        if len(shape) == 1:  # norms around one and biases around zero, as trained models have them
            out.write(
                (
                    block[:left] + np.float16(key.endswith(("norm.weight", "norm1.weight", "norm2.weight")))
                ).tobytes()
            )
            continue
        while left:
            piece = block[position : position + left]
            out.write(piece.data)
            left -= len(piece)
            position = (position + len(piece)) % len(block)


def _write_tokenizer(path: Path) -> None:
    """Words that it does not know become `<unk>`; the special tokens have the published ids."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE_TOKEN}
    tokenizer = Tokenizer(models.WordLevel(vocab=special, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))
