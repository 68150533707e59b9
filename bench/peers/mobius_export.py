"""A LLaVA decoder as mobius exports it: python mobius_export.py CHECKPOINT FOLDER f16|f32

Its command line finds no weights for a model in parts, so they are handed over here, by the names it gives them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mobius
from mobius._model_package import _apply_weights_to_model
from request import peak_rss_bytes
from safetensors.torch import load_file


def export_decoder(checkpoint: Path, folder: Path, dtype: str) -> None:
    """Into `model.onnx` and its weights."""
    package = mobius.build(str(checkpoint), load_weights=False, dtype=dtype, execution_provider="cpu")
    decoder = package["decoder"]
    files = checkpoint.glob("*.safetensors")
    stored = {key: value for file in files for key, value in load_file(file).items()}
    weights = {}
    for name, value in decoder.graph.initializers.items():
        if value.const_value is None:
            key = name.removeprefix("decoder.")
            # As transformers 5 names them, and as the published checkpoint does.
            keys = (key, key.replace("model.", "model.language_model.", 1), f"language_model.{key}")
            found = next(stored[each] for each in keys if each in stored)
            weights[name] = found.float() if dtype == "f32" else found
    _apply_weights_to_model(decoder, weights)
    package.save(str(folder), components=lambda name: name == "decoder", progress_bar=False)


if __name__ == "__main__":
    source, out, kind = sys.argv[1:]
    export_decoder(Path(source), Path(out), kind)
    written = sum(file.stat().st_size for file in Path(out).iterdir())
    print(
        json.dumps({"peak_rss_gb": round(peak_rss_bytes() / 1e9, 3), "written_mb": round(written / 1e6, 2)})
    )
