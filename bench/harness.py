"""What every benchmark does: options, stand-in checkpoints, measurements in a process of its own, a record at the end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gap_export.checkpoint.random_weights import Published, published, write_checkpoint
from gap_export.environment import cpu_name, versions
from gap_export.errors import MissingRequirementError

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("gap-export", "numpy", "onnxruntime", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")
SCRATCH = Path(tempfile.gettempdir()) / "gap-export-bench"
"""Where checkpoints and bundles are put, and found again by the next run."""

_FLAGS = {"avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}
"""Those that decide how fast matrix products are."""
LLAVA_7B = published("llava-hf/llava-1.5-7b-hf").config
LLAVA_13B = published("llava-hf/llava-1.5-13b-hf").config
IMAGE_TOKEN = LLAVA_7B["image_token_index"]
LLAVA_135M = {
    **LLAVA_7B,
    "torch_dtype": "float16",
    "vision_config": {
        **LLAVA_7B["vision_config"],
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 512,
    },
    "text_config": {
        **LLAVA_7B["text_config"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
"""A tower as CLIP-B/14 at 336 pixels (576 patches) and a decoder as SmolLM-135M: what fits a laptop."""


def parser_of(docstring: str | None, *, scratch: bool = False) -> argparse.ArgumentParser:
    """A parser with the options that benchmarks have in common.

    Args:
        docstring: of the benchmark, whose first line is shown.
        scratch: whether it leaves anything in a folder for its next run.
    """
    parser = argparse.ArgumentParser(description=(docstring or "").partition("\n")[0])
    if scratch:
        parser.add_argument("--scratch", type=Path, default=SCRATCH)
    parser.add_argument("--label", default="", help="words stored with the record")
    return parser


def in_fresh_process(command: list[str]) -> dict[str, Any]:
    """What a process says about itself in its last line, and its wall time: the start of Python and every import count."""
    began = time.perf_counter()
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - began
    measured: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return {"seconds": round(seconds, 2), **measured}


def finish(name: str, measured: dict[str, Any], *, label: str, ok: bool, store: bool = True) -> int:
    """Store and print; the exit code is 0 when all targets were met, else 1."""
    content = record(name, measured, label=label, ok=ok)
    if store:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content))
    return 0 if ok else 1


def record(name: str, measured: dict[str, Any], *, label: str, ok: bool) -> dict[str, Any]:
    """What was measured, with what has to be known about it."""
    return {
        "benchmark": name,
        "label": label,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "ok": ok,
        **measured,
    }


def machine() -> dict[str, Any]:
    """What the figures depend on; the load says whether the machine was idle."""
    return {
        "cpu": cpu_name(),
        "flags": sorted(_FLAGS & processor_flags()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def processor_flags() -> frozenset[str]:
    """Instruction sets of the processor, as Linux calls them; none where it does not tell."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def truncated(config: dict[str, Any], *, text_layers: int, vision_layers: int) -> dict[str, Any]:
    """The same widths with fewer layers."""
    return {
        **config,
        "text_config": {**config["text_config"], "num_hidden_layers": text_layers},
        "vision_config": {**config["vision_config"], "num_hidden_layers": vision_layers},
    }


def ensure_checkpoint(folder: Path, config: dict[str, Any]) -> tuple[Path, int]:
    """Write a checkpoint folder, or take the one that an earlier run left there.

    Returns:
        (folder, bytes of its weights).

    Raises:
        SystemExit: something else is in the way, or no space on the disk.
    """
    if folder.exists() and json.loads((folder / "config.json").read_text()) != config:
        raise SystemExit(f"{folder} holds another checkpoint; remove it or choose another --scratch")
    if not folder.exists():
        whole = published("llava-hf/llava-1.5-7b-hf")
        try:
            write_checkpoint(folder, Published(config, whole.preprocessor_config, whole.special_tokens))
        except MissingRequirementError as error:
            raise SystemExit(str(error)) from error
    return folder, sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
