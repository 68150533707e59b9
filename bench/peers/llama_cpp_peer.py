"""The decoder in llama.cpp: python llama_cpp_peer.py CHECKPOINT THREADS NEW_TOKENS f32|q8_0|q4_k_m BUNDLE

Its converter knows the tokenizers of published models alone, so the decoder is written to GGUF here, without a tokenizer; lower precisions are
quantised by llama.cpp itself. Images go through `vision` and `splice` of an unpruned bundle of ours, and embeddings into llama.cpp.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import onnxruntime as ort
from exported_decoder_peer import run
from gguf_names import AROUND, LAYER
from request import export_facts, now, request, serve
from safetensors.numpy import load_file

TYPES = {
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q4_k_s": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def write_gguf(checkpoint: Path, path: Path) -> None:
    """The decoder in fp32."""
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads", heads)
    rope = text.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(text.get("head_dim") or text["hidden_size"] // heads)
    writer.add_rope_freq_base(float(text.get("rope_theta") or rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(checkpoint.glob("*.safetensors")):
        for key, weight in load_file(file).items():
            name = _gguf_name(key)
            if name is None:
                continue
            weight = weight.astype(np.float32)
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                weight = _interleaved(weight, heads if "attn_q" in name else kv_heads)
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(key: str) -> str | None:
    """Of a checkpoint's key, as published or as transformers 5 writes it; None for what is not of the decoder."""
    if "vision_tower" in key or "multi_modal_projector" in key:
        return None
    parts = key.removesuffix(".weight").split(".")
    if "layers" in parts:
        at = parts.index("layers")
        return f"blk.{parts[at + 1]}.{LAYER['.'.join(parts[at + 2 :])]}.weight"
    return f"{AROUND[parts[-1]]}.weight"


def _interleaved(weight: Any, heads: int) -> Any:
    """Rows of a head in pairs, as llama.cpp rotates them, instead of in halves."""
    rows, inner = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, inner).swapaxes(1, 2).reshape(rows, inner)


def quantised(whole: Path, kind: str, threads: int = 0) -> Path:
    """Beside a decoder in fp32, one as llama.cpp makes it of that; `f32` is the decoder itself."""
    if kind == "f32":
        return whole
    path = whole.with_name(f"{kind}.gguf")
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = TYPES[kind], threads
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), ctypes.byref(how)):
        raise SystemExit(f"llama.cpp could not quantise to {kind}")
    return path


class Decoder:
    """A model, its context, and one batch of embeddings."""

    def __init__(self, path: Path, threads: int, slots: int, width: int, kind: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = slots  # a prompt in one go
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = kind
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._prompt = llama_cpp.llama_batch_init(slots, width, 1)
        self._token = llama_cpp.llama_batch_init(1, 0, 1)

    def prompt(self, embeds_SH: Any) -> int:
        """The first token; forgets what was there."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        ctypes.memmove(self._prompt.embd, embeds_SH.ctypes.data, embeds_SH.nbytes)
        return self._decode(self._prompt, len(embeds_SH), 0)

    def token(self, token: int, position: int) -> int:
        """The next one."""
        self._token.token[0] = token
        return self._decode(self._token, 1, position)

    def _decode(self, batch: Any, count: int, first: int) -> int:
        batch.n_tokens = count
        for place in range(count):
            batch.pos[place], batch.n_seq_id[place], batch.seq_id[place][0] = first + place, 1, 0
            batch.logits[place] = place == count - 1
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama.cpp could not decode")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def main() -> None:
    source, threads, count, kind, bundle = sys.argv[1:]
    checkpoint = Path(source)
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = int(threads), 3
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        began = now()
        path = Path(scratch) / "decoder.gguf"
        write_gguf(checkpoint, path)
        path = quantised(path, kind, int(threads))
        facts = export_facts(began, Path(scratch))
        began = now()
        asked = request(source)
        vision, splice = (
            ort.InferenceSession(
                str(Path(bundle) / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
            )
            for name in ("vision", "splice")
        )
        length = asked.expanded_ids.shape[1]
        width = json.loads((checkpoint / "config.json").read_text())["text_config"]["hidden_size"]
        cached = llama_cpp.GGML_TYPE_F32 if kind == "f32" else llama_cpp.GGML_TYPE_F16
        decoder = Decoder(path, int(threads), length + int(count), width, cached)
        facts["load_s"] = now() - began
        spliced = [given.name for given in splice.get_inputs()]

        def answer() -> tuple[float, list[float], list[int]]:
            began = now()
            embeds, kept = run(vision, {"pixel_values": asked.pixels})
            offered = {"input_ids": asked.input_ids[None], "visual_embeds": embeds, "kept_indices": kept}
            embeds, *_ = run(splice, {name: offered[name] for name in spliced})
            tokens = [decoder.prompt(embeds.numpy()[0])]
            readings = [now()]
            for turn in range(int(count) - 1):
                tokens.append(decoder.token(tokens[-1], length + turn))
                readings.append(now())
            return readings[0] - began, np.diff(readings).tolist(), tokens

        versions = {"llama-cpp-python": version("llama-cpp-python"), "onnxruntime": ort.__version__}
        facts["compiled_for"] = llama_cpp.llama_print_system_info().decode().strip(" |")
        serve({"versions": versions, **facts}, answer)


if __name__ == "__main__":
    main()
