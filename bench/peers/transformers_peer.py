"""transformers in PyTorch: in fp32 eager, sdpa, or compiled with a static cache; or sdpa in bf16.

python transformers_peer.py CHECKPOINT THREADS NEW_TOKENS eager|sdpa|compile|bf16
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import transformers
from request import now, request, serve
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache


@torch.inference_mode()
def main() -> None:
    checkpoint, threads, count, kind = sys.argv[1:]
    new_tokens = int(count)
    torch.set_num_threads(int(threads))
    began = now()
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    attention = "eager" if kind == "eager" else "sdpa"
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation=attention, local_files_only=True
    ).eval()
    load_s = now() - began
    asked = request(checkpoint)
    pixels, input_ids = torch.from_numpy(asked.pixels).to(dtype), torch.from_numpy(asked.expanded_ids)
    length = input_ids.shape[1]
    # The prompt runs as it is; compiled are the calls with one token, whose shapes do not change.
    step = (
        torch.compile(model.forward, mode="max-autotune-no-cudagraphs")
        if kind == "compile"
        else model.forward
    )

    def answer() -> tuple[float, list[float], list[int]]:
        cache = (
            StaticCache(config=model.config.text_config, max_cache_len=length + new_tokens)
            if kind == "compile"
            else DynamicCache()
        )
        began = now()
        out = model(
            input_ids=input_ids, pixel_values=pixels, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        tokens, readings = [int(out.logits[0, -1].argmax())], [now()]
        for turn in range(new_tokens - 1):
            place = torch.tensor([[length + turn]])
            out = step(
                input_ids=torch.tensor([tokens[-1:]]),
                position_ids=place,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens.append(int(out.logits[0, -1].argmax()))
            readings.append(now())
        return readings[0] - began, np.diff(readings).tolist(), tokens

    if kind == "compile":
        began = now()
        answer()
        load_s += now() - began
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    serve({"versions": versions, "load_s": load_s}, answer)


if __name__ == "__main__":
    main()
