"""Is lint right about other exporters' decoders? Its verdict on each graph beside what the graph was measured to do.

    python bench/exporters/environment.py        # once
    python bench/lint_exporters.py [--exporters NAME,...] [--scratch FOLDER] [--label TEXT] [--keep] [--store FOLDER]

Every exporter writes two small random decoders in every way it has. A prompt with gapped ids is run in ONNX Runtime and compared with
transformers in PyTorch: *off* is the distance of the graph's logits to those that transformers gives to gapped ids, as a share of what the
gaps change: 0 where ids are followed, 1 where they are ignored. Graphs that no prompt can be fed to (steps, ours with its own embeddings) are
measured by `lint --prove` alone. The last line printed is the record, also stored in bench/results/lint_exporters.json. A false alarm or a false
pass is exit code 1. `--store tests/linter/data` renews the graphs that the tests hold the verdict to: those of one model, without weights.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "exporters")]
import environment  # noqa: E402
import harness  # noqa: E402

import gap_export as gap  # noqa: E402
from gap_export.errors import LintError  # noqa: E402
from gap_export.linter.call import Call  # noqa: E402
from gap_export.linter.dataflow import name_of  # noqa: E402
from gap_export.linter.load import load  # noqa: E402
from gap_export.linter.running import Running, open_session  # noqa: E402

GAPPED = np.array([[0, 1, 6, 7, 11, 20]])
STORED = {
    "transformers": "plain/prefill plain/decode cpu/prefill cpu/decode cpu-batch/prefill cpu-batch/decode cuda/prefill cuda/decode webgpu/prefill",
    "genai": "cpu-fp32/model dml-fp16/model",
    "mobius": "cpu/model default/model",
    "optimum": "text-generation-with-past/model",
    "torch": "ids/model mask/model none/model packed/model",
}
"""Exporter -> graphs of the first model that are stored for tests: one of each kind."""
LARGEST_STORED = 512
"""Elements of the largest tensor that is stored."""
FOLLOWED = 0.1
"""Share of what the gaps change; graphs in float16 and int4 are off by less, graphs that ignore gaps by all of it."""


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--exporters", default=",".join([*environment.EXPORTERS, "ours"]))
    parser.add_argument("--keep", action="store_true", help="take graphs that were written before")
    parser.add_argument("--store", type=Path, help="put graphs of one model there, without weights")
    options = parser.parse_args()
    chosen, folder = options.exporters.split(","), options.scratch / "exporters"
    for name in environment.ENVIRONMENTS:
        if not environment.python_of(options.scratch, name).exists():
            raise SystemExit("the environments are missing: run `python bench/exporters/environment.py`")
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    console = Console(width=160)
    if not (folder / "checkpoints").is_dir():
        write(options.scratch, "exporters-five", "checkpoint", console)
    for exporter in chosen:
        if (folder / exporter).is_dir():
            continue
        if exporter == "ours":
            gap.build(gap.Recipe.load("shapes", keep=0.25), folder / "ours" / "shapes", golden=False)
        else:
            write(options.scratch, environment.EXPORTERS[exporter], exporter, console)
    graphs = [found for exporter in chosen for found in sorted((folder / exporter).rglob("*.onnx"))]
    graphs = [path for path in graphs if path.stem not in ("vision", "splice", "embed")]
    rows = [examine(path, folder) for path in graphs]
    console.print(table(rows))
    if options.store is not None:
        store(options.store, folder, rows)
    wrong = [row for row in rows if row["wrong"]]
    summary = {
        "graphs": len(rows),
        "measured": sum(row["truth"] is not None for row in rows),
        "false_alarms": sum(row["wrong"] == "false alarm" for row in rows),
        "false_passes": sum(row["wrong"] == "false pass" for row in rows),
    }
    return harness.finish("lint_exporters", {**summary, "rows": rows}, label=options.label, ok=not wrong)


def write(scratch: Path, name: str, exporter: str, console: Console) -> None:
    console.print(f"writing: {exporter}")
    python = environment.python_of(scratch, name)
    command = [str(python), str(HERE / "exporters" / "write.py"), exporter, str(scratch / "exporters")]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("left out"):
            console.print(f"  {line}", markup=False)
    if done.returncode:
        raise SystemExit(f"{exporter} could not be run: {done.stderr[-2000:]}")


def examine(path: Path, folder: Path) -> dict[str, Any]:
    """The verdict on one graph, and what it was measured to do."""
    report = gap.lint(path, kind="decoder")
    try:
        proof = gap.lint(path, kind="decoder", prove=True).proof
        proved = None if proof is None else proof.outcome
        said = "" if proof is None else proof.sentence
    except LintError as error:
        proved, said = "contradicts", error.message
    off = off_transformers(path, folder)
    measured = None if proved == "not run here" else proved
    truth = measured if off is None else "survive" if off < FOLLOWED else "do not survive"
    if off is not None and measured == "do not survive":
        truth = measured  # of a batch: one row alone is right
    answer, wrong = report.verdict.answer, ""
    if truth is not None and answer != truth:
        wrong = (
            "false pass" if answer == "survive" else "false alarm" if truth == "survive" else "contradicted"
        )
    return {
        "exporter": path.relative_to(folder).parts[0],
        "graph": "/".join((*path.relative_to(folder).parts[1:-1], path.stem)),
        "answer": answer,
        "reason": report.verdict.reason,
        "proof": proved,
        "proof_says": said.replace(str(folder), ""),
        "off": off,
        "truth": truth,
        "wrong": wrong,
    }


def off_transformers(path: Path, folder: Path) -> float | None:
    """How far a prompt with gapped ids is from transformers, as a share of what the gaps change; None where it takes no such prompt."""
    reference = folder / "checkpoints" / f"{path.parent.name.split('-')[0]}.npz"
    _, flow = load(path)
    inputs = {name_of(value): value for value in flow.inputs}
    if not reference.is_file() or "input_ids" not in inputs:
        return None
    known = np.load(reference)
    try:
        with open_session(path, flow.model) as session:
            how = Running(session, flow, inputs.get("position_ids")).inputs
            if how.static("tokens") not in (None, 6):
                return None
            call = Call(how.static("rows") or 1, 6, 0)
            ids = GAPPED.repeat(call.rows, axis=0)
            feeds = {name: how.feed(value, call, ids) for name, value in inputs.items()}
            feeds["input_ids"] = known["input_ids"].repeat(call.rows, axis=0).astype(feeds["input_ids"].dtype)
            logits = np.asarray(session.run(["logits"], feeds)[0], np.float64)[0]
    except Exception as error:  # what the runtime has not, or does not take
        print(f"not run: {path}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return None
    rows = slice(-len(logits), None)
    gapped, contiguous = (known[key][0, rows].astype(np.float64) for key in ("gapped", "contiguous"))
    return float(np.abs(logits - gapped).max() / np.abs(contiguous - gapped).max())


def store(target: Path, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Graphs of one model, what they were measured to do in their names; weights, comments and shapes of the insides are left out."""
    target.mkdir(parents=True, exist_ok=True)
    for row in rows:
        graph = row["graph"].removeprefix("llama-")
        if row["truth"] is None or graph not in STORED.get(row["exporter"], "").split():
            continue
        model = onnx.load(folder / row["exporter"] / f"{row['graph']}.onnx", load_external_data=False)
        model.doc_string, model.graph.name = "", "decoder"
        del model.metadata_props[:]
        for thing in (model.graph, *model.graph.node, *model.graph.value_info, *model.functions):
            thing.doc_string = ""
            del thing.metadata_props[:]
        for tensor in model.graph.initializer:
            if np.prod(tensor.dims) > LARGEST_STORED:
                tensor.ClearField("raw_data")
                del tensor.float_data[:]
                tensor.data_location = onnx.TensorProto.EXTERNAL
                del tensor.external_data[:]
                tensor.external_data.add(key="location", value="left-out")
        name = "-".join((row["exporter"], *graph.removesuffix("/model").split("/")))
        truth = row["truth"].replace(" ", "_")
        (target / f"{name}.{truth}.onnx").write_bytes(model.SerializeToString())


def table(rows: list[dict[str, Any]]) -> Table:
    drawn = Table("exporter", "graph", "verdict", "proof", "off", "")
    for row in rows:
        off = "" if row["off"] is None else f"{row['off']:.1e}"
        drawn.add_row(row["exporter"], row["graph"], row["answer"], row["proof"], off, row["wrong"])
    return drawn


if __name__ == "__main__":
    sys.exit(main())
