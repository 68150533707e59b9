"""Writes the generated parts of the documents: `make docs`. A test compares them with what is there.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; what is outside is written by hand.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gap_export import families, prune
from gap_export.boxes.codecs import CODECS
from gap_export.evaluation.refer.annotations import FORMATS
from gap_export.evaluation.refer.published import METRICS
from gap_export.files import readable_size
from gap_export.files.kinds import FILE_KINDS
from gap_export.precision import PRECISIONS
from gap_export.runtime import backends

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gap_export"


def layers() -> str:
    """The import order, from the test that holds it, with what each package says of itself."""
    location = ROOT / "tests" / "test_architecture.py"
    spec = importlib.util.spec_from_file_location("layering", location)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = ["| layer | what it is |", "|---|---|"]
    for name in module.LAYERS:
        path = PACKAGE / name
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        first = " ".join(docstring.partition("\n\n")[0].split())
        rows.append(f"| `{name}{'/' if path.is_dir() else ''}` | {first} |")
    return "\n".join(rows)


def pruners(*, in_decoder: bool) -> str:
    """The pruners that work before the decoder, or inside it, from their rows."""
    rows = ["| pruner | keeps | needs | count | prunes | merges |", "|---|---|---|---|---|---|"]
    for row in prune.PRUNERS.values():
        if row.in_decoder == in_decoder:
            count = "static or adaptive" if row.adaptive else "static"
            cells = (
                f"`{row.name}`",
                row.summary,
                prune.needs(row),
                count,
                prune.where(row),
                prune.merging(row),
            )
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def precisions() -> str:
    """The precisions, from their rows."""
    rows = [
        "| `--precision` | weights and products | everything else | bytes per weight | perplexity | `--ranges` | ONNX Runtime on CPUs | TensorRT, TensorRT-RTX |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in PRECISIONS.values():
        capability = row.min_compute_capability
        engines = "yes" if capability is None else f"compute capability {capability} and later"
        cells = (
            f"`{row.name}`",
            row.summary,
            row.activations.name,
            f"{row.bytes_per_weight:g}",
            "-" if row.perplexity_rise is None else _percent(row.perplexity_rise),
            "needed" if row.needs_ranges else "-",
            "yes" if row.cpu else "no",
            engines if row.engines else "no",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def runtimes() -> str:
    """The runtimes, from their rows."""
    rows = [
        "| `--backend` | runs | `--device` | `--precision-hint` | `--provider` | to install |",
        "|---|---|---|---|---|---|",
    ]
    for name in backends.names():
        row = backends.row(name)
        cells = (
            f"`{name}`",
            "the checkpoint" if row.target is None else "graphs" if row.target == "onnx" else "engines",
            ", ".join(f"`{device}`" for device in row.devices),
            ", ".join(f"`{hint}`" for hint in row.hints) or "-",
            "yes" if row.providers else "-",
            f"`pip install '{row.requirement}'`" if row.requirement else "nothing more",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def cuda_kernels() -> str:
    """The operators of decoders, and which floats ONNX Runtime's CUDA provider has kernels for, from the record of `bench/cuda_kernels.py`."""
    record = json.loads((ROOT / "bench" / "results" / "cuda_kernels.json").read_text(encoding="utf-8"))
    rows = [
        f"| opset {record['opset']}, onnxruntime-gpu {record['onnxruntime_gpu']} | {' | '.join(KERNEL_TYPES)} |",
        "|---" * (len(KERNEL_TYPES) + 1) + "|",
    ]
    for operator in DECODER_OPERATORS:
        types = record["kernels"].get(operator)
        found = {name for allowed in (types or {}).values() for name in allowed}
        cells = ["yes" if name in found else "-" for name in KERNEL_TYPES]
        rows.append(f"| `{operator}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def real_weights() -> str:
    """What precisions cost a decoder that was trained, and what peers' do, from the record of `bench/real_weights.py`."""
    record = json.loads((ROOT / "bench" / "results" / "real_weights.json").read_text(encoding="utf-8"))
    rows = [
        "| | bits | perplexity | KL | same first choice | one by one | TTFT | per token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in record["gap_export"].items():
        read = row["prefill"]
        cells = (
            f"**{name}**",
            f"{row['bits_per_weight']:.2f}",
            _percent(row["rise"]),
            f"{read['mean_kl']:.4f}",
            f"{read['top1_agreement']:.3f}",
            _percent(row["steps_rise"]),
            f"{row['ttft_ratio']:.2f}",
            f"{row['tpot_ratio']:.2f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    for name, row in record["peers"].items():
        cells = (
            name,
            f"{row['bits_per_weight']:.2f}",
            _percent(row["rise"]),
            f"{row['mean_kl']:.4f}",
            f"{row['top1_agreement']:.3f}",
        )
        rows.append(f"| {' | '.join(cells)} | | | |")
    return "\n".join(rows)


def _percent(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f} %"  # what rounds to -0 is 0


def models() -> str:
    """The families, from their rows; what checkpoints are named and laid out like, and how boxes are written."""
    rows = [
        "| family | published as | visual tokens | position ids | boxes of | written as |",
        "|---|---|---|---|---|---|",
    ]
    for name in families.names():
        row = families.row(name)
        ids = "one row" if row.position_rows == 1 else "three rows"
        frame = "the padded square" if row.box.frame == "padded_square" else "the image"
        example = CODECS[row.box.codec].example
        rows.append(
            f"| `{name}` | {row.published} | {row.visual_tokens} | {ids} | {frame} | `{_cell(example)}` |"
        )
    return "\n".join(rows)


def matrix() -> str:
    """Which pruner works on which family, and what the others lack."""
    names = families.names()
    rows = [f"| | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for pruner in prune.PRUNERS.values():
        lacking = (families.row(name).lacks(pruner) for name in names)
        cells = (f"needs {what}" if what else "yes" for what in lacking)
        rows.append(f"| `{pruner.name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def box_formats() -> str:
    """The box codecs, from their rows; who scores them, from the table of evaluators."""
    rows = [
        "| `--box-format` | a box | numbers | without a family, of | scored under `unc` by |",
        "|---|---|---|---|---|",
    ]
    for codec in CODECS.values():
        cells = (
            f"`{codec.name}`",
            f"`{_cell(codec.example)}`",
            UNITS[codec.unit],
            "what the model sees" if codec.pixels else f"the {codec.frame.replace('_', ' ')}",
            METRICS[codec.name].name
            if codec.name in METRICS
            else f"nothing published: IoU {codec.comparator} 0.5",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    """Text for a cell of a table: a bar would end it."""
    return text.replace("|", "\\|")


def formats() -> str:
    """The formats of annotations, from their rows."""
    rows = ["| `--data` | published by | images |", "|---|---|---|"]
    rows += [f"| {row.files} | {row.published_by} | {row.images} |" for row in FORMATS.values()]
    return "\n".join(rows)


def limits() -> str:
    """The kinds of files that are read, and the most bytes of one."""
    rows = ["| file | at most |", "|---|---|"]
    rows += [
        f"| {kind.name} | {'no limit: mapped, or read in pieces' if kind.largest is None else readable_size(kind.largest)} |"
        for kind in FILE_KINDS
    ]
    return "\n".join(rows)


UNITS = {None: "pixels of what the model sees", 1.0: "fractions", 100.0: "hundredths", 1000.0: "thousandths"}
"""What the numbers of a box are, by the number of the far edge."""

KERNEL_TYPES = ("float32", "float16", "bfloat16", "int64", "int8", "int4", "bool")

DECODER_OPERATORS = (
    "Abs",
    "Add",
    "And",
    "Attention",
    "Cast",
    "Clip",
    "Concat",
    "Cos",
    "DequantizeLinear",
    "Div",
    "Equal",
    "Expand",
    "Gather",
    "GatherElements",
    "Gemm",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "MatMul",
    "MatMulInteger",
    "Max",
    "Min",
    "Mod",
    "Mul",
    "Neg",
    "Pow",
    "QuantizeLinear",
    "RMSNormalization",
    "Range",
    "Reciprocal",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceSum",
    "Reshape",
    "RotaryEmbedding",
    "ScatterElements",
    "ScatterND",
    "Shape",
    "Sigmoid",
    "Sin",
    "Slice",
    "Softmax",
    "Split",
    "Squeeze",
    "Sub",
    "TensorScatter",
    "TopK",
    "Transpose",
    "Unsqueeze",
    "Where",
)
"""Of the decoders of every family, in every precision."""

PARTS: dict[str, tuple[Path, Callable[[], str]]] = {
    "models": (ROOT / "docs" / "models.md", models),
    "matrix": (ROOT / "docs" / "models.md", matrix),
    "box formats": (ROOT / "docs" / "models.md", box_formats),
    "layers": (ROOT / "docs" / "architecture.md", layers),
    "precisions": (ROOT / "docs" / "precision.md", precisions),
    "runtimes": (ROOT / "docs" / "runtimes.md", runtimes),
    "cuda kernels": (ROOT / "docs" / "cuda_kernels.md", cuda_kernels),
    "real weights": (ROOT / "docs" / "precision.md", real_weights),
    "formats": (ROOT / "docs" / "evaluation.md", formats),
    "limits": (ROOT / "SECURITY.md", limits),
    "pruners": (ROOT / "docs" / "pruners.md", partial(pruners, in_decoder=False)),
    "pruners inside the decoder": (ROOT / "docs" / "pruners.md", partial(pruners, in_decoder=True)),
}
"""Name -> (document, what stands in it)."""


def written(name: str, text: str, content: str) -> str:
    """The document with a generated part put in place of the one that is there."""
    pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no part {name!r} in the document")
    return pattern.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text, count=1)


def main() -> None:
    """Write every part."""
    for name, (document, generate) in PARTS.items():
        text = document.read_text(encoding="utf-8")
        document.write_text(written(name, text, generate()), encoding="utf-8")


if __name__ == "__main__":
    main()
