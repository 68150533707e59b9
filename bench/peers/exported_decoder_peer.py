"""Decoders as other exporters write them, in ONNX Runtime: mobius (fused attention, a cache that grows), or transformers' own exporter.

python exported_decoder_peer.py CHECKPOINT THREADS NEW_TOKENS mobius|transformers BUNDLE

Neither exports the tower of this model: transformers' exporter leaves it to PyTorch, and mobius knows towers without a class token
alone. So images go through `vision`, `splice` and `embed` of an unpruned bundle of ours; only the decoder differs.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from request import Request, export_facts, now, request, serve


def export_with_mobius(checkpoint: Path, folder: Path) -> None:
    """In fp32, with the fusions mobius has for CPUs."""
    from mobius_export import export_decoder

    export_decoder(checkpoint, folder, "f32")


def export_with_transformers(checkpoint: Path, folder: Path) -> None:
    """`export_for_generation`: the prompt without its head, the head, and one step."""
    import torch
    from transformers import LlavaForConditionalGeneration
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    asked = request(str(checkpoint))
    sample = {
        "input_ids": torch.from_numpy(asked.expanded_ids),
        "pixel_values": torch.from_numpy(asked.pixels),
    }
    sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    exported = OnnxExporter().export_for_generation(model, sample, OnnxConfig(dynamic=True))
    exported.save_pretrained(folder)


class Mobius:
    """One graph for prompt and token; gives logits of every row."""

    def __init__(self, folder: Path, load: Any, asked: Request) -> None:
        self._decoder = load(folder / "model.onnx")
        self._past = [f"{part}.{kind}" for part in range(asked.layers) for kind in ("key", "value")]
        self._empty = np.zeros((1, asked.kv_heads, 0, asked.head_dim), np.float32)

    def prompt(self, embeds: Any, ids: Any) -> tuple[Any, list[Any]]:
        """Logits of the last row, and the cache."""
        empty = ort.OrtValue.ortvalue_from_numpy(self._empty)
        return self._call(embeds, ids.shape[1], [empty] * len(self._past))

    def token(self, embeds: Any, token: int, position: int, cache: list[Any]) -> tuple[Any, list[Any]]:
        """The same after one token."""
        return self._call(embeds, position + 1, cache)

    def _call(self, embeds: Any, length: int, cache: list[Any]) -> tuple[Any, list[Any]]:
        mask = np.ones((1, length), np.int64)
        pasts = {f"past_key_values.{name}": value for name, value in zip(self._past, cache, strict=True)}
        logits, *present = run(self._decoder, {"inputs_embeds": embeds, "attention_mask": mask, **pasts})
        return logits.numpy()[0, -1], present


class Transformers:
    """Three graphs."""

    def __init__(self, folder: Path, load: Any, asked: Request) -> None:
        self._prompt, self._head, self._token = (
            load(folder / f"{name}.onnx") for name in ("language_model", "lm_head", "decode")
        )

    def prompt(self, embeds: Any, ids: Any) -> tuple[Any, list[Any]]:
        """Logits of the last row, and the cache."""
        hidden, *cache = run(self._prompt, {"inputs_embeds": embeds, "position_ids": ids})
        (logits,) = run(self._head, {"input": np.ascontiguousarray(hidden.numpy()[:, -1:])})
        return logits.numpy()[0, 0], cache

    def token(self, embeds: Any, token: int, position: int, cache: list[Any]) -> tuple[Any, list[Any]]:
        """The same after one token."""
        names = [given.name for given in self._token.get_inputs() if "past_key_values" in given.name]
        feeds = {"input_ids": np.array([[token]]), "position_ids": np.array([[position]])}
        logits, *cache = run(self._token, {**feeds, **dict(zip(names, cache, strict=True))})
        return logits.numpy()[0, -1], cache


KINDS = {"mobius": (export_with_mobius, Mobius), "transformers": (export_with_transformers, Transformers)}


def run(session: Any, feeds: dict[str, Any]) -> list[Any]:
    """Values in and out without a copy."""
    binding = session.io_binding()
    for name, value in feeds.items():
        given = ort.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
        binding.bind_ortvalue_input(name, given)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    session.run_with_iobinding(binding)
    return list(binding.get_outputs())


def main() -> None:
    checkpoint, threads, count, kind, bundle = sys.argv[1:]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = int(threads), 3

    def load(path: Path) -> Any:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    export, runner = KINDS[kind]
    with tempfile.TemporaryDirectory(dir=Path(checkpoint).parent) as scratch:
        folder = Path(scratch)
        began = now()
        export(Path(checkpoint), folder)
        facts = export_facts(began, folder)
        began = now()
        asked = request(checkpoint)
        decoder = runner(folder, load, asked)
        vision, splice, embed = (
            load(Path(bundle) / f"{name}.onnx") for name in ("vision", "splice", "embed")
        )
        facts["load_s"] = now() - began
        spliced = [given.name for given in splice.get_inputs()]

        def answer() -> tuple[float, list[float], list[int]]:
            began = now()
            embeds, kept = run(vision, {"pixel_values": asked.pixels})
            offered = {"input_ids": asked.input_ids[None], "visual_embeds": embeds, "kept_indices": kept}
            embeds, ids, *_ = run(splice, {name: offered[name] for name in spliced})
            ids = ids.numpy()
            logits, cache = decoder.prompt(embeds, ids)
            tokens, readings = [int(logits.argmax())], [now()]
            for turn in range(int(count) - 1):
                (row,) = run(embed, {"input_ids": np.array([tokens[-1:]])})
                logits, cache = decoder.token(row, tokens[-1], ids.shape[1] + turn, cache)
                tokens.append(int(logits.argmax()))
                readings.append(now())
            return readings[0] - began, np.diff(readings).tolist(), tokens

        exporter = {"mobius": "mobius-onnx", "transformers": "transformers"}[kind]
        versions = {exporter: version(exporter), "onnxruntime": ort.__version__}
        serve({"versions": versions, **facts}, answer)


if __name__ == "__main__":
    main()
