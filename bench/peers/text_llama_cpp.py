"""Logits of a text in llama.cpp: python text_llama_cpp.py CHECKPOINT IDS.npy LOGITS.npy f32|q8_0|q4_0|q4_1|q4_k_s|q4_k_m"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from llama_cpp_peer import quantised, write_gguf


def bits_per_weight(path: Path) -> float:
    """Of matrices of the layers: what is left of embedding, head and norms."""
    layers = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name.startswith("blk.")]
    matrices = [tensor for tensor in layers if "norm" not in tensor.name]
    return float(8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices))


def main() -> None:
    checkpoint, ids_file, logits_file, kind = sys.argv[1:]
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    ids = np.load(ids_file)
    with tempfile.TemporaryDirectory(dir=Path(logits_file).parent) as scratch:
        path = Path(scratch) / "f32.gguf"
        write_gguf(Path(checkpoint), path)
        path = quantised(path, kind)
        bits = bits_per_weight(path)
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = len(ids)
        settings.n_threads = settings.n_threads_batch = 2
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(model, settings)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = int(token), place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, True
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama.cpp could not decode")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        logits = llama_cpp.llama_get_logits(context)
        np.save(logits_file, np.ctypeslib.as_array(logits, (len(ids), vocabulary)))
    print(json.dumps({"bits_per_weight": bits, "llama-cpp-python": version("llama-cpp-python")}))


if __name__ == "__main__":
    main()
