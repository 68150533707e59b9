"""OpenVINO as optimum-intel exports LLaVA to it: vision, embeddings and a decoder with a cache of its own.

python openvino_peer.py CHECKPOINT THREADS NEW_TOKENS fp32|default

`fp32` asks for arithmetic and cache in fp32, as all others have them. `default` leaves both to OpenVINO.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
import torch
from optimum.intel import OVModelForVisualCausalLM
from request import now, peak_rss_bytes, request, serve


@torch.inference_mode()
def main() -> None:
    checkpoint, threads, count, kind = sys.argv[1:]
    new_tokens = int(count)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if kind == "fp32":
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    with tempfile.TemporaryDirectory(dir=Path(checkpoint).parent) as folder:
        began = now()
        exported = OVModelForVisualCausalLM.from_pretrained(
            checkpoint, export=True, compile=False, load_in_8bit=False
        )
        exported.save_pretrained(folder)
        facts = {
            "export_s": now() - began,
            "export_peak_rss_bytes": peak_rss_bytes(),
            "written_bytes": sum(file.stat().st_size for file in Path(folder).iterdir()),
        }
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
