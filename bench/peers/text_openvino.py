"""Logits of a text in OpenVINO: python text_openvino.py DECODER IDS.npy LOGITS.npy f32|int8|int4_sym|int4_asym GROUP [default]

DECODER is a Llama as transformers stores it; weights are compressed by NNCF's defaults, in groups of GROUP (0: one scale per row). Arithmetic and cache
are in fp32, or with `default` what OpenVINO chooses.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from openvino_weights import FP32, compressed
from optimum.intel import OVModelForCausalLM

_LOW = ("i8", "u8", "i4", "u4")


def bits_per_weight(model: Any) -> float:
    """Of matrices of the layers: their numbers, zero points and scales; neither embedding nor head."""
    bits = elements = 0
    for node in model.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() != "Constant" or "layers." not in name or "proj" not in name:
            continue
        kind, count = node.get_element_type(), int(np.prod(list(node.get_output_shape(0))))
        bits += kind.bitwidth * count
        if kind.get_type_name() in _LOW and "zero_point" not in name:
            elements += count
    return bits / elements if elements else 32.0


def main() -> None:
    decoder, ids_file, logits_file, kind, group, *chosen = sys.argv[1:]
    ids = torch.from_numpy(np.load(ids_file))[None]
    with tempfile.TemporaryDirectory(dir=Path(logits_file).parent) as folder:
        exported = OVModelForCausalLM.from_pretrained(decoder, export=True, compile=False, load_in_8bit=False)
        if kind != "f32":
            exported.model = compressed(exported.model, kind, int(group))
        bits = bits_per_weight(exported.model)
        exported.save_pretrained(folder)
        del exported
        settings = {"INFERENCE_NUM_THREADS": "2", "PERFORMANCE_HINT": "LATENCY"}
        if not chosen:
            settings |= FP32
        model = OVModelForCausalLM.from_pretrained(folder, ov_config=settings)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        np.save(logits_file, np.asarray(logits, np.float32))
    print(json.dumps({"bits_per_weight": bits, "openvino": openvino.__version__, "nncf": nncf.__version__}))


if __name__ == "__main__":
    main()
