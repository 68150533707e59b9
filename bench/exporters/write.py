"""Small random decoders as another exporter writes them: python write.py EXPORTER FOLDER, in one of the environments of environment.py.

`checkpoint` instead of an exporter writes the checkpoints (Llama, and Qwen 2 with its biases) and, for each, the logits that transformers gives
to one prompt with contiguous and with gapped ids. What an exporter cannot do is printed and left out.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

# Extents that differ from each other: exporters tell tensors apart by their shapes.
SIZES = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
MODELS = ("llama", "qwen2")
CONTIGUOUS, GAPPED = [0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 11, 20]


def write_checkpoints(folder: Path) -> None:
    import numpy as np
    import torch
    import transformers as t
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    made = {
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
        "qwen2": t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    }
    words = {f"w{i}": i for i in range(78)} | {"<s>": 78, "</s>": 79}
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), bos_token="<s>", eos_token="</s>"
    )
    for name, model in made.items():
        model.eval().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        tokens = torch.randint(1, 60, (1, 6))
        with torch.no_grad():
            logits = {
                key: model(input_ids=tokens, position_ids=torch.tensor([ids])).logits.numpy()
                for key, ids in (("contiguous", CONTIGUOUS), ("gapped", GAPPED))
            }
        np.savez(folder / f"{name}.npz", input_ids=tokens.numpy(), **logits)


def attempt(what: str, write: Callable[[], object]) -> None:
    try:
        write()
        print(f"written: {what}", flush=True)
    except Exception:
        print(f"left out: {what}: {traceback.format_exc(limit=0).strip().splitlines()[-1]}", flush=True)


def with_transformers(checkpoints: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(checkpoints / name).eval()
        for fusions in (None, "cpu", "cuda", "webgpu", "dml"):
            for rows in (1, 2) if name == "llama" else (1,):
                tokens = torch.randint(1, 60, (rows, 6))
                sample = {
                    "input_ids": tokens,
                    "attention_mask": torch.ones_like(tokens),
                    "position_ids": torch.arange(6)[None].repeat(rows, 1),
                }
                out = folder / f"{name}-{fusions or 'plain'}{'-batch' if rows > 1 else ''}"

                def write(fusions=fusions, sample=sample, out=out, model=model) -> None:
                    config = OnnxConfig(dynamic=True, ort_fusions=fusions)
                    exported = OnnxExporter().export_for_generation(model, sample, config)
                    out.mkdir(parents=True, exist_ok=True)
                    exported.save_pretrained(out)

                attempt(out.name, write)


def with_torch(checkpoints: Path, folder: Path) -> None:
    """As many export by hand: ids as an input, made from the mask, or left to the model."""
    import torch
    from transformers import AutoModelForCausalLM

    class Called(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, way: str) -> None:
            super().__init__()
            self.model, self.way = model, way

        def forward(self, input_ids, attention_mask, position_ids):  # type: ignore[no-untyped-def]
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
            if self.way == "ids":
                given["position_ids"] = position_ids
            if self.way == "mask":
                given["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            if self.way == "packed":
                del given["attention_mask"]
                given["position_ids"] = position_ids
            return self.model(**given).logits

    names = ["input_ids", "attention_mask", "position_ids"]
    axis = torch.export.Dim.AUTO
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(checkpoints / name, attn_implementation="sdpa").eval()
        for way in ("ids", "mask", "none", "packed"):
            sample = (
                torch.randint(1, 60, (1, 6)),
                torch.ones(1, 6, dtype=torch.int64),
                torch.arange(6)[None],
            )
            out = folder / f"{name}-{way}"
            out.mkdir(parents=True, exist_ok=True)

            def write(way=way, sample=sample, out=out, model=model) -> None:
                torch.onnx.export(
                    Called(model, way),
                    sample,
                    out / "model.onnx",
                    dynamo=True,
                    opset_version=20,
                    input_names=names,
                    output_names=["logits"],
                    dynamic_shapes=tuple({1: axis} for _ in names),
                    verbose=False,
                )

            attempt(out.name, write)


def with_genai(checkpoints: Path, folder: Path) -> None:
    for name in MODELS:
        for provider, precision in (
            ("cpu", "fp32"),
            ("cpu", "int4"),
            ("cuda", "fp16"),
            ("dml", "fp16"),
            ("webgpu", "fp16"),
        ):
            out = folder / f"{name}-{provider}-{precision}"
            command = [
                sys.executable,
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                str(checkpoints / name),
                "-o",
                str(out),
            ]
            command += ["-p", precision, "-e", provider, "-c", str(folder / "cache")]
            attempt(
                out.name, lambda command=command: subprocess.run(command, check=True, capture_output=True)
            )


def with_optimum(checkpoints: Path, folder: Path) -> None:
    for name in MODELS:
        for task in ("text-generation", "text-generation-with-past"):
            out = folder / f"{name}-{task}"
            command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "onnx"]
            command += ["--model", str(checkpoints / name), "--task", task, str(out)]
            attempt(
                out.name, lambda command=command: subprocess.run(command, check=True, capture_output=True)
            )


def with_mobius(checkpoints: Path, folder: Path) -> None:
    import mobius

    for name in MODELS:
        for provider in ("default", "cpu", "cuda", "dml", "webgpu"):
            out = folder / f"{name}-{provider}"

            def write(name=name, provider=provider, out=out) -> None:
                package = mobius.build(str(checkpoints / name), dtype="f32", execution_provider=provider)
                package.save(str(out), progress_bar=False)

            attempt(out.name, write)


WRITERS = {
    "transformers": with_transformers,
    "torch": with_torch,
    "genai": with_genai,
    "optimum": with_optimum,
    "mobius": with_mobius,
}

if __name__ == "__main__":
    exporter, scratch = sys.argv[1], Path(sys.argv[2])
    if exporter == "checkpoint":
        write_checkpoints(scratch / "checkpoints")
    else:
        WRITERS[exporter](scratch / "checkpoints", scratch / exporter)
