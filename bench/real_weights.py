"""What low precision costs a decoder that was trained: perplexity, agreement with PyTorch, and time, beside llama.cpp and OpenVINO.

    python bench/real_weights.py [--tokens 2048] [--rounds 15] [--no-peers] [--only ROW;ROW] [--scratch FOLDER] [--label TEXT]

SmolLM2-135M-Instruct (`peers/smollm2.py`), behind the tower of a small LLaVA with random weights, so that bundles are built as ever. The text is
prose that every Python brings: chapters of its language reference. Each precision reads it in one call of --tokens tokens and then 256 more one by
one (`gap-export validate --text`); peers read the same tokens in one call. What was read is kept in --scratch, and read again only where bundle, text or
peer changed; requests are made anew every time, of all bundles in turns. The last line printed is the record, also stored in
bench/results/real_weights.json. Needs the environment of `peers/environment.py`, and 4 GB of disk.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]
import environment  # noqa: E402
import harness  # noqa: E402
from harness import LLAVA_135M, ensure_checkpoint  # noqa: E402
from modes import BF16_FLAGS  # noqa: E402

import gap_export as gap  # noqa: E402
from gap_export.boxes.scenes import cases  # noqa: E402
from gap_export.evaluation.text_parity import TextReport, measure  # noqa: E402
from gap_export.files import sha256_of  # noqa: E402
from gap_export.graph.quantize.store import FILE  # noqa: E402

CALIBRATED = "int4 --calibration"
BUNDLES = ("fp32", "fp16", "int8", "int8-blocks", "int4", CALIBRATED)
"""Precisions; one of them also with weights whose errors are compensated on a text."""
BF16 = "openvino:bf16"
ROWS = {
    **{name: (name, "onnxruntime") for name in BUNDLES},
    **{f"{name} in {BF16}": (name, BF16) for name in ("fp32", "int8-blocks", "int4")},
}
"""Name -> bundle, and what runs it; in bf16 where the processor has it."""
PEERS = {
    "llama.cpp Q8_0": ("text_llama_cpp.py", "q8_0"),
    "llama.cpp Q4_0": ("text_llama_cpp.py", "q4_0"),
    "llama.cpp Q4_1": ("text_llama_cpp.py", "q4_1"),
    "llama.cpp Q4_K_S": ("text_llama_cpp.py", "q4_k_s"),
    "llama.cpp Q4_K_M": ("text_llama_cpp.py", "q4_k_m"),
    "OpenVINO int8": ("text_openvino.py", "int8", "0"),
    "OpenVINO INT4_SYM, 32": ("text_openvino.py", "int4_sym", "32"),
    "OpenVINO INT4_ASYM, 32": ("text_openvino.py", "int4_asym", "32"),
    "OpenVINO INT4_ASYM, 64": ("text_openvino.py", "int4_asym", "64"),
    "OpenVINO, its default": ("text_openvino.py", "f32", "0", "default"),
    "OpenVINO, its default, int8": ("text_openvino.py", "int8", "0", "default"),
    "OpenVINO, its default, INT4_ASYM, 32": ("text_openvino.py", "int4_asym", "32", "default"),
    "transformers bf16": ("text_transformers.py", "bf16"),
}
"""Name -> script and arguments. OpenVINO computes in fp32 unless that is left to it: then in bf16 where the processor has it."""
TEXT = ("objects", "types", "execmodel", "naming", "import", "exceptions", "with", "class", "function")
CALIBRATION = ("typesmapping", "typesseq", "debugger", "comparisons", "assignment", "try", "async", "numbers")
"""Chapters that are read, and others that weights of four bits are chosen by."""
IMAGE_TOKEN = ("<empty_output>", 16)
"""A token that no text has; it becomes the placeholder."""
MOST_INT8_RISE, MOST_INT8_TTFT = 0.02, 0.75
NEW_TOKENS = 8


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--tokens", type=int, default=2048, help="of the first call")
    parser.add_argument("--rounds", type=int, default=15, help="of requests, in turns")
    parser.add_argument("--no-peers", action="store_true", help="measure gap-export alone")
    parser.add_argument(
        "--only", help="rows, separated by semicolons; all others stay as they are in the record"
    )
    options = parser.parse_args()
    chosen = set(options.only.split(";")) if options.only else {*ROWS, *PEERS}
    if unknown := chosen - {*ROWS, *PEERS}:
        parser.error(f"--only: no row {', '.join(sorted(unknown))}; there are {', '.join([*ROWS, *PEERS])}")
    console = Console()
    options.scratch.mkdir(parents=True, exist_ok=True)
    decoder, facts = ensure_decoder(options.scratch)
    checkpoint = ensure_llava(options.scratch, decoder)
    text, calibration = (options.scratch / f"{name}.txt" for name in ("text", "calibration"))
    for path, chapters in ((text, TEXT), (calibration, CALIBRATION)):
        path.write_text("\n\n".join(pydoc_data.topics.topics[name] for name in chapters))
    rows, peers = stored(options.tokens, text, facts) if options.only else ({}, {})
    has_bf16 = bool(BF16_FLAGS & harness.processor_flags())
    wanted = {name: row for name, row in ROWS.items() if name in chosen and (has_bf16 or row[1] != BF16)}
    bundles = {}
    for name in BUNDLES:
        if options.only and name != "fp32" and name not in {of for of, _ in wanted.values()}:
            continue
        console.print(f"building {name}")
        bundles[name] = build(
            options.scratch / f"bundle-{name.replace(' ', '')}", checkpoint, name, calibration
        )
    for name, (of, backend) in wanted.items():
        console.print(f"reading in {name}")
        report = read(bundles[of], backend, text, options.tokens, options.scratch)
        rows[name] = {
            "bits_per_weight": bits_per_weight(bundles[of].folder),
            **{part: getattr(report, part).model_dump() for part in ("prefill", "steps")},
            "rise": report.prefill.perplexity_rise,
            "steps_rise": report.steps.perplexity_rise,
            "ok": report.ok,
        }
    times = latencies(
        {name: (bundles[of], backend) for name, (of, backend) in {"fp32": ROWS["fp32"], **wanted}.items()},
        options.rounds,
    )
    for name in wanted:
        rows[name] |= times[name]
    if not options.no_peers:
        peers |= read_by_peers(options, chosen, checkpoint, decoder, text, console)
    print_table(console, rows, peers)
    four_bit = [
        peer["rise"]
        for peer in peers.values()
        if 4 <= peer["bits_per_weight"] <= rows["int4"]["bits_per_weight"]
    ]
    targets = {
        "int8: perplexity, rise": (rows["int8"]["rise"], MOST_INT8_RISE),
        "int8: TTFT, of fp32's": (rows["int8"]["ttft_ratio"], MOST_INT8_TTFT),
        **(
            {f"{CALIBRATED}: perplexity, rise": (rows[CALIBRATED]["rise"], min(four_bit))} if four_bit else {}
        ),
    }
    for name, (measured, limit) in targets.items():
        console.print(f"{name}: {measured:.3f}, at most {limit:.3f}")
    return harness.finish(
        "real_weights",
        {
            "checkpoint": facts,
            "tokens": options.tokens,
            "text_sha256": sha256_of(text),
            "gap_export": rows,
            "peers": peers,
            "targets": {name: {"measured": m, "at_most": limit} for name, (m, limit) in targets.items()},
        },
        label=options.label,
        ok=all(measured <= limit for measured, limit in targets.values()),
    )


def ensure_decoder(scratch: Path) -> tuple[Path, dict[str, Any]]:
    """(a Llama as transformers stores it, what was said as it was made)."""
    folder, said = scratch / "smollm2", scratch / "smollm2.json"
    if not (said.exists() and folder.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        said.write_text(json.dumps(_peer(scratch, "smollm2.py", str(folder))))
    return folder, json.loads(said.read_text())


def ensure_llava(scratch: Path, decoder: Path) -> Path:
    """The same decoder behind a tower with random weights."""
    folder = scratch / "smollm2-llava"
    stand_in, _ = ensure_checkpoint(scratch / "llava-135m", LLAVA_135M)
    inner = json.loads((decoder / "config.json").read_text())
    kept = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    also = ("head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "vocab_size")
    config = {
        **LLAVA_135M,
        "torch_dtype": "float32",
        "image_token_index": IMAGE_TOKEN[1],
        "pad_token_id": inner["eos_token_id"],
        "text_config": {
            "model_type": "llama",
            "bos_token_id": inner["bos_token_id"],
            "eos_token_id": inner["eos_token_id"],
            **{name: inner[name] for name in (*kept, *also)},
        },
    }
    if folder.exists():
        if json.loads((folder / "config.json").read_text()) == config:
            return folder
        raise SystemExit(f"{folder} holds another checkpoint; remove it or choose another --scratch")
    weights = {
        f"language_model.{key}": value for key, value in load_file(decoder / "model.safetensors").items()
    }
    for shard in stand_in.glob("*.safetensors"):
        for key, value in load_file(shard).items():
            if "vision_tower" in key or "multi_modal_projector" in key:
                weights[key] = value.astype(np.float32)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        if (stand_in / name).exists():
            shutil.copy(stand_in / name, folder)
    tokenizer = (decoder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace(IMAGE_TOKEN[0], "<image>"))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def build(folder: Path, checkpoint: Path, name: str, calibration: Path) -> Any:
    recipe = gap.Recipe.load(
        "llava",
        checkpoint=str(checkpoint),
        precision=name.partition(" ")[0],
        calibration=str(calibration) if name == CALIBRATED else None,
        keep=0.25,
        pruner="cls_attention",
    )
    return gap.build(recipe, folder, replace=True, golden=False)


def stored(
    tokens: int, text: Path, checkpoint: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Rows of the record, ours and the peers'.

    Raises:
        SystemExit: it is of another text, or of another decoder.
    """
    record = json.loads((harness.RESULTS / "real_weights.json").read_text())
    mine = (tokens, sha256_of(text), checkpoint)
    if mine != (record["tokens"], record["text_sha256"], record["checkpoint"]):
        raise SystemExit("--only: the record is of another text or decoder; measure all rows")
    return record["gap_export"], record["peers"]


def read(bundle: Any, backend: str, text: Path, tokens: int, scratch: Path) -> TextReport:
    """By the bundle and by PyTorch, or as it was the last time."""
    ran = "" if backend == "onnxruntime" else f".{backend.replace(':', '-')}"
    kept = scratch / f"{bundle.folder.name}{ran}.text_parity.json"
    if kept.exists():
        report = TextReport.model_validate_json(kept.read_text())
        read_before = (report.manifest_sha256, report.source_sha256, report.prefill and report.prefill.tokens)
        if read_before == (bundle.manifest_sha256, sha256_of(text), tokens):
            return report
    report = gap.validate_text(bundle, text, tokens=tokens, backend=backend, threads=2)
    kept.write_text(report.text())
    return report


def bits_per_weight(folder: Path) -> float:
    """Of matrices of the layers: their numbers, scales and zero points; neither embedding nor head."""
    if not (folder / FILE).exists():
        return 16.0 if (folder / "weights-fp16.safetensors").exists() else 32.0
    bits = elements = 0
    with safe_open(folder / FILE, "np") as stored:
        for key in stored.keys():  # noqa: SIM118  (not a dict)
            if ".layers." not in key or "language_model" not in key:
                continue
            part = stored.get_tensor(key)
            bits += 8 * part.nbytes
            if key.endswith(".int8"):
                elements += part.size
            elif key.endswith((".uint4", ".int4")):
                elements += 2 * part.size
    return bits / elements


def latencies(bundles: dict[str, tuple[Any, str]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds to the first token and per token, and their ratios to fp32: medians over requests in turns, two threads."""
    (case,) = cases(1)
    models = {
        name: gap.load(bundle, backend=backend, threads=2) for name, (bundle, backend) in bundles.items()
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            answer = model.ground(case.image, case.expression, max_new_tokens=NEW_TOKENS)
            spent = answer.timings
            if turn:
                per_token = spent.decode / max(1, answer.new_tokens - 1)
                found[name].append((1e3 * (spent.vision + spent.prefill), 1e3 * per_token))
    for model in models.values():
        model.close()
    medians = {
        name: [statistics.median(each) for each in zip(*runs, strict=True)] for name, runs in found.items()
    }
    return {
        name: {
            "ttft_ms": ttft,
            "tpot_ms": tpot,
            "ttft_ratio": ttft / medians["fp32"][0],
            "tpot_ratio": tpot / medians["fp32"][1],
        }
        for name, (ttft, tpot) in medians.items()
    }


def read_by_peers(
    options: Any, chosen: set[str], checkpoint: Path, decoder: Path, text: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """Every peer on the same tokens, against the same logits of PyTorch."""
    from tokenizers import Tokenizer

    ids = np.array(
        Tokenizer.from_file(str(decoder / "tokenizer.json")).encode(text.read_text()).ids, np.int64
    )
    ids = ids[: options.tokens + 1]
    reference, logits = options.scratch / "reference.npy", options.scratch / "logits.npy"
    ids_file = options.scratch / "ids.npy"
    np.save(ids_file, ids[:-1])
    kept = options.scratch / "peers.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    found = {}
    for name, (script, *arguments) in PEERS.items():
        if name not in chosen:
            continue
        if name == "transformers bf16" and not BF16_FLAGS & harness.processor_flags():
            continue
        files = (ids_file, HERE / "peers" / script, decoder / "model.safetensors")
        made_of = [*map(sha256_of, files), *arguments]
        if before.get(name, {}).get("made_of") == made_of:
            found[name] = before[name]
            continue
        if not reference.exists():
            _peer(
                options.scratch, "text_transformers.py", str(decoder), str(ids_file), str(reference), "fp32"
            )
        truth = np.load(reference, mmap_mode="r")
        console.print(f"reading with {name}")
        source = checkpoint if script == "text_llama_cpp.py" else decoder
        said = _peer(options.scratch, script, str(source), str(ids_file), str(logits), *arguments)
        measured = measure(np.load(logits, mmap_mode="r"), truth, ids[1:])
        rise = measured.perplexity_rise
        found[name] = {**said, **measured.model_dump(), "rise": rise, "made_of": made_of}
        kept.write_text(json.dumps({**before, **found}))
    for path in (reference, logits, ids_file):
        path.unlink(missing_ok=True)
    return {name: {key: row[key] for key in row if key != "made_of"} for name, row in found.items()}


def _peer(scratch: Path, script: str, *arguments: str) -> dict[str, Any]:
    """What a script of `peers/` says in its last line, run in their environment."""
    python = environment.python_of(scratch)
    if not python.exists():
        raise SystemExit("peers need an environment of their own: run `python bench/peers/environment.py`")
    child = subprocess.run(
        [str(python), str(HERE / "peers" / script), *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    said: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return said


def print_table(console: Console, rows: dict[str, dict[str, Any]], peers: dict[str, dict[str, Any]]) -> None:
    table = Table("", "bits", "one call", "KL", "top 1", "one by one", "TTFT", "TPOT")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['bits_per_weight']:.2f}",
            f"{100 * row['rise']:+.2f} %",
            f"{row['prefill']['mean_kl']:.4f}",
            f"{row['prefill']['top1_agreement']:.3f}",
            f"{100 * row['steps_rise']:+.2f} %",
            f"{row['ttft_ratio']:.2f}",
            f"{row['tpot_ratio']:.2f}",
        )
    for name, row in peers.items():
        shown = (f"{row['bits_per_weight']:.2f}", f"{100 * row['rise']:+.2f} %", f"{row['mean_kl']:.4f}")
        table.add_row(name, *shown, f"{row['top1_agreement']:.3f}", "", "", "")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
