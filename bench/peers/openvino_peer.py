"""OpenVINO as optimum-intel exports LLaVA to it: vision, embeddings and a decoder with a cache of its own.

python openvino_peer.py CHECKPOINT THREADS NEW_TOKENS fp32|default|int8|int4

`fp32` asks for arithmetic and cache in fp32, as all others have them. `default` leaves both to OpenVINO; so do `int8` and `int4`, whose decoder has weights of
eight bits, or of four in groups of 32 with zero points, and whose tower and embeddings have eight.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
import torch
from openvino_weights import FP32, compressed
from optimum.intel import OVModelForVisualCausalLM
from request import export_facts, now, request, serve
from safetensors.torch import load_file, save_file


def as_it_names_them(checkpoint: Path, folder: Path) -> Path:
    """A copy with the tower's weights under the names of the transformers that optimum-intel needs; those it does not find it makes up."""
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors" and file.suffixes[-2:] != [".safetensors", ".index.json"]:
            shutil.copy(file, folder)
    stored = {
        key: value for file in checkpoint.glob("*.safetensors") for key, value in load_file(file).items()
    }
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    named = {
        key if tower not in key or inner in key else key.replace(tower, inner, 1): value
        for key, value in stored.items()
    }
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.inference_mode()
def main() -> None:
    checkpoint, threads, count, kind = sys.argv[1:]
    new_tokens = int(count)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if kind == "fp32":
        settings |= FP32
    beside = Path(checkpoint).parent
    with tempfile.TemporaryDirectory(dir=beside) as source, tempfile.TemporaryDirectory(dir=beside) as folder:
        renamed = as_it_names_them(Path(checkpoint), Path(source))
        began = now()
        exported = OVModelForVisualCausalLM.from_pretrained(
            renamed, export=True, compile=False, load_in_8bit=False
        )
        if kind in ("int8", "int4"):
            for name, part in exported.ov_models.items():
                low = "int4_asym" if kind == "int4" and name == "lm_model" else "int8"
                exported.replace_ov_model(part, compressed(part, low, 32))
        exported.save_pretrained(folder)
        facts = export_facts(began, Path(folder))
        del exported
        began = now()
        model = OVModelForVisualCausalLM.from_pretrained(folder, ov_config=settings)
        model.compile()
        load_s = now() - began
        asked = request(checkpoint)
        pixels = torch.from_numpy(asked.pixels)
        input_ids = torch.from_numpy(asked.expanded_ids)
        length = input_ids.shape[1]

        def answer() -> tuple[float, list[float], list[int]]:
            began = now()
            mask = torch.ones(1, length, dtype=torch.int64)
            ids = torch.arange(length)[None]
            out = model(input_ids=input_ids, pixel_values=pixels, attention_mask=mask, position_ids=ids)
            tokens, readings = [int(out.logits[0, -1].argmax())], [now()]
            for turn in range(new_tokens - 1):
                mask = torch.ones(1, length + turn + 1, dtype=torch.int64)
                out = model(
                    input_ids=torch.tensor([tokens[-1:]]),
                    attention_mask=mask,
                    position_ids=torch.tensor([[length + turn]]),
                    past_key_values=out.past_key_values,
                )
                tokens.append(int(out.logits[0, -1].argmax()))
                readings.append(now())
            return readings[0] - began, np.diff(readings).tolist(), tokens

        versions = {"openvino": openvino.__version__, "optimum-intel": version("optimum-intel")}
        serve({"versions": versions, "load_s": load_s, **facts}, answer)


if __name__ == "__main__":
    main()
