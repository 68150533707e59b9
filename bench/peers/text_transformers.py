"""Logits of a text in transformers: python text_transformers.py DECODER IDS.npy LOGITS.npy fp32|bf16"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import transformers


def main() -> None:
    decoder, ids_file, logits_file, kind = sys.argv[1:]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder, dtype=dtype).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(np.load(ids_file))[None]).logits[0]
    np.save(logits_file, logits.float().numpy())
    print(json.dumps({"bits_per_weight": 8.0 * dtype.itemsize, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
