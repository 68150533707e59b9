"""Logits of a text in transformers, in fp32: python text_transformers.py DECODER IDS.npy LOGITS.npy"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import transformers


def main() -> None:
    decoder, ids_file, logits_file = sys.argv[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(np.load(ids_file))[None]).logits[0]
    np.save(logits_file, logits.numpy())
    print(json.dumps({"transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
