"""Records for people: tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from gap_export.boxes.codecs import CODECS
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.bundle.golden import golden_image
from gap_export.bundle.manifest import Manifest, Pruning
from gap_export.bundle.spec import TensorSpec
from gap_export.engine.inspect import engine_facts
from gap_export.errors import named
from gap_export.evaluation import bundle_reports
from gap_export.evaluation.parity import ParityReport
from gap_export.evaluation.text_parity import TextReport
from gap_export.inputs.tokenizer import load_tokenizer
from gap_export.terminal import Terminal, styled


def print_parity(report: ParityReport, console: Terminal) -> None:
    """Gates, controls and the grounding table."""
    console.print(_gate_table(report))
    controls = Table("negative control", "caught by", "")
    for control in report.controls:
        controls.add_row(control.name, ", ".join(control.by) or "nothing", _mark(control.caught))
    for name in report.inapplicable_controls:
        controls.add_row(name, "changes nothing in this bundle", "-")
    console.print(controls)
    console.print(grounding_table(report))
    verdict = ("all gates met", "bold green") if report.ok else ("a gate was not met", "bold red")
    console.say(verdict, f" on {report.measurement.cases} held-out scenes")


def print_text_parity(report: TextReport, console: Terminal) -> None:
    """Perplexities of both parts, and gates."""
    table = Table(
        "tokens",
        "perplexity",
        "PyTorch",
        "rise",
        "mean KL",
        "same first choice",
        title=f"{report.bundle} ({report.precision}), {report.source}",
    )
    for name, part in (("in one call", report.prefill), ("one by one", report.steps)):
        if part is None:
            table.add_row(name, *["-"] * 4, "a decoder that drops tokens reads text one by one alone")
            continue
        table.add_row(
            f"{part.tokens} {name}",
            f"{part.perplexity:.4g}",
            f"{part.reference_perplexity:.4g}",
            f"{100 * part.perplexity_rise:+.2f} %",
            f"{part.mean_kl:.2g}",
            f"{part.top1_agreement:.3f}",
        )
    console.print(table)
    console.print(_gate_table(report))
    if not report.control_caught:
        console.say(
            ("halved position ids were not noticed: the gates are too loose for this text", "bold red")
        )
    verdict = ("all gates met", "bold green") if report.ok else ("a gate was not met", "bold red")
    console.say(verdict)


def _gate_table(report: ParityReport | TextReport) -> Table:
    gates = Table(
        "gate",
        "measured",
        "required",
        "",
        title=f"{report.bundle} in {report.backend} against PyTorch",
    )
    for gate in report.gates:
        gates.add_row(
            gate.name, f"{gate.measured:.6g}", f"{gate.comparison} {gate.limit:g}", _mark(gate.passed)
        )
    return gates


def grounding_table(report: ParityReport) -> Table:
    """Accuracy per position policy, all through exported graphs."""
    grounding = report.grounding
    whole, pruned = (
        f"{grounding.visual_tokens}/{grounding.visual_tokens}",
        f"{grounding.kept:g}/{grounding.visual_tokens}",
    )
    table = Table(
        "positions",
        "tokens",
        "acc@0.5",
        "of full",
        "std. error",
        title=f"{report.bundle}, {report.backend}",
    )
    for name, tokens, accuracy in (
        ("none (unpruned)", whole, grounding.full),
        ("shifted", pruned, grounding.shifted),
        ("permuted", pruned, grounding.permuted),
        ("gap", pruned, grounding.gap),
    ):
        share = f"{100 * accuracy / grounding.full:.1f} %" if grounding.full else "-"
        error = (accuracy * (1 - accuracy) / grounding.cases) ** 0.5
        table.add_row(name, tokens, f"{accuracy:.3f}", share, f"{error:.3f}")
    return table


def bundle_facts(bundle: Bundle | Path | str, *, every_hash: bool = False) -> dict[str, Any]:
    """What is inside a bundle, as one record that can be written as JSON.

    Args:
        bundle: opened, or its folder; it is verified.
        every_hash: verify the hashes of large files too.

    Raises:
        BundleError: there is no bundle, or it is damaged.
    """
    bundle = open_bundle(bundle, every_hash=every_hash)
    manifest = bundle.manifest
    pruning, model = manifest.pruning, manifest.spec
    return {
        "bundle": str(bundle.folder),
        "name": manifest.name,
        "family": manifest.family,
        "checkpoint": manifest.checkpoint,
        "precision": manifest.precision,
        "box_format": {**manifest.box.model_dump(), "example": CODECS[manifest.box.codec].example},
        "end_tokens": end_tokens(bundle),
        "chat": None
        if manifest.chat is None
        else {"source": manifest.chat.source, "content": manifest.chat.content},
        "golden": _golden(bundle),
        "pruner": pruning.pruner,
        "positions": pruning.positions,
        "keep": keeping(pruning, model.visual_tokens),
        "kept": pruning.kept_after_last_stage,
        "mean_kept": pruning.mean_kept,
        "keep_mode": pruning.keep_mode,
        "min_tokens": pruning.min_tokens,
        "max_tokens": pruning.max_tokens,
        "text_tower": manifest.text_tower.model_dump() if manifest.text_tower else None,
        "visual_tokens": model.visual_tokens,
        "capacity": manifest.capacity,
        "cache": cache_length(manifest),
        "ids_and_slots": ids_and_slots(bundle),
        "stages": stages(pruning),
        "graphs": {
            name: {
                "file": graph.file,
                "bytes": manifest.files[graph.file].bytes,
                "inputs": [_shown(tensor) for tensor in graph.spec.inputs],
                "outputs": [_shown(tensor) for tensor in graph.spec.outputs],
                "in_place": len(graph.spec.aliased),
                "operators": graph.operators,
            }
            for name, graph in manifest.graphs.items()
        },
        "engines": {
            target: {
                name: engine_facts(bundle.folder / engine.file, engine, manifest.graphs[name].spec)
                for name, engine in engines.items()
            }
            for target, engines in manifest.engines.items()
        },
        "files": {name: record.bytes for name, record in manifest.files.items()},
        "reports": bundle_reports.states(bundle),
        "versions": manifest.versions,
    }


def _golden(bundle: Bundle) -> dict[str, Any] | None:
    """What the golden request asks; its image is read too."""
    golden = bundle.golden
    if golden is None:
        return None
    golden_image(bundle.folder, golden)
    return {"expression": golden.expression, "decided_by": golden.decided_by, "box": golden.right.box}


def keeping(pruning: Pruning, visual_tokens: int) -> str:
    """How many visual tokens a bundle keeps, in words."""
    if pruning.stages:
        return _keeping_at_the_end(pruning, visual_tokens)
    if pruning.keep_mode == "ratio":
        return f"keep {pruning.keep:g} of every image, at most {pruning.max_tokens} of {visual_tokens}"
    if pruning.keep_mode == "dynamic":
        return (
            f"keep {pruning.min_tokens} to {pruning.max_tokens} of {visual_tokens}, {pruning.kept} by default"
        )
    if pruning.keep_mode == "bounded":
        return f"keep what each image needs, at most {pruning.keep:g} of it, {pruning.max_tokens} of {visual_tokens}"
    if pruning.keep_mode == "adaptive":
        return f"keep what each image needs, at most {pruning.max_tokens} of {visual_tokens}"
    return f"keep {pruning.kept} of {visual_tokens}"


def _keeping_at_the_end(pruning: Pruning, visual_tokens: int) -> str:
    """What is left where tokens are dropped inside the decoder: after the last stage, in every stage, and in the mean by which papers compare."""
    by_stage = ", ".join(str(stage.kept) for stage in pruning.stages)
    mean = f"{pruning.mean_kept:.4g} in the mean over layers"
    if not pruning.stage_counts_are_told:
        return f"keep {pruning.kept_after_last_stage} of {visual_tokens} at the end ({by_stage} by stage), {mean}"
    share = f"{pruning.keep:g}"
    if pruning.keep_range is not None:
        share = f"{pruning.keep_range[0]:g} to {pruning.keep_range[1]:g} ({pruning.keep:g} by default)"
    return f"keep {share} of every image at the end; of a typical one {by_stage} by stage, {mean}"


def end_tokens(bundle: Bundle) -> list[dict[str, Any]]:
    """The tokens that end an answer: id and name of each, the name None where the tokenizer has none."""
    tokenizer = load_tokenizer(bundle.tokenizer_path)
    return [{"id": id_, "token": tokenizer.id_to_token(id_)} for id_ in bundle.manifest.prompt.eos_token_ids]


def ends_in_words(ends: Sequence[dict[str, Any]]) -> str:
    """What `end_tokens` gives, for people."""
    listed = ", ".join(f"{named(end['token'] or 'token')} ({end['id']})" for end in ends)
    return f"answers end at {listed}"


def cache_length(manifest: Manifest) -> str:
    """How many slots its cache has, in words."""
    return f"cache of {'' if manifest.cache_layout.static else 'up to '}{manifest.capacity} slots"


def ids_and_slots(bundle: Bundle) -> list[dict[str, str]]:
    """The rule by which tokens of this bundle get position ids and cache slots."""
    pruning, model = bundle.manifest.pruning, bundle.manifest.spec
    kept = str(pruning.kept) if pruning.keep_mode == "fixed" else "K"
    if pruning.stages:
        kept = "K_s"
    extent = str(model.visual_tokens) if model.token_range is None else "N"
    visual_id = "T_pre + i_k"
    if model.position_rows == 3:
        extent, visual_id = "max(rows, columns)", "(T_pre, T_pre + row of i_k, T_pre + column of i_k)"
    if pruning.positions != "gap":
        extent, visual_id = kept, "T_pre + k"
    return [
        {"token": "text before the image, j", "position_id": "j", "slot": "j"},
        {
            "token": "kept visual token k",
            "position_id": visual_id,
            "slot": "T_pre + k",
        },
        {
            "token": "text after the image, j",
            "position_id": f"T_pre + {extent} + j",
            "slot": f"T_pre + {kept} + j",
        },
        {
            "token": "generated token t",
            "position_id": f"T_pre + {extent} + T_post + t",
            "slot": f"T_pre + {kept} + T_post + t",
        },
    ]


def stages(pruning: Pruning) -> list[dict[str, Any]]:
    """What the layers of every stage see, and which counter tells their slots; nothing where all layers see the same."""
    return [
        {
            "stage": number,
            "layers": [stage.run[0], stage.run[-1]],
            "kept": stage.kept,
            "max_kept": stage.max_kept,
            "merged": stage.merged,
            "capacity": stage.capacity,
            "next_slot": "next_slot" + (f".{number}" if number else ""),
            "write_index": "write_index" + (f".{number}" if number else ""),
            "reads_ids": "position_ids" if pruning.positions == "gap" or not number else "its slots",
        }
        for number, stage in enumerate(pruning.stages)
    ]


def print_bundle(facts: dict[str, Any], console: Terminal) -> None:
    """The record of `bundle_facts`, for people."""
    console.say(
        (facts["name"], "bold"),
        f" ({facts['family']}, {facts['precision']}): {facts['keep']} ({facts['pruner']}), positions {facts['positions']}, "
        f"{facts['cache']}",
    )
    box = facts["box_format"]
    console.say(f"boxes {box['example']} ({box['codec']}, of the {box['frame'].replace('_', ' ')})")
    console.say(ends_in_words(facts["end_tokens"]))
    console.say(
        f"free questions in {facts['chat']['source']}"
        if facts["chat"]
        else "no chat template: free questions cannot be asked"
    )
    console.say(
        f"golden request {facts['golden']['expression']!r}, decided by {facts['golden']['decided_by']}"
        if facts["golden"]
        else f"no golden request, which serve needs: gap-export golden {facts['bundle']}"
    )
    rule = Table("token", "position id", "cache slot")
    for row in facts["ids_and_slots"]:
        rule.add_row(row["token"], row["position_id"], row["slot"])
    console.print(rule)
    if facts["stages"]:
        runs = Table(
            "stage s",
            "layers",
            "K_s",
            "merged",
            "cache slots",
            "first slot to generate",
            "write index",
            "RoPE reads",
        )
        for stage in facts["stages"]:
            first, last = stage["layers"]
            kept, most = stage["kept"], stage["max_kept"]
            runs.add_row(
                str(stage["stage"]), f"{first} to {last}", f"{kept}" if kept == most else f"{kept}, at most {most}", str(stage["merged"]), str(stage["capacity"]),
                stage["next_slot"], stage["write_index"], stage["reads_ids"],
            )  # fmt: skip
        console.print(runs)
    graphs = Table("graph", "size", "inputs", "outputs")
    for name, graph in facts["graphs"].items():
        graphs.add_row(
            name, f"{graph['bytes'] / 1e3:.0f} kB", _some(graph["inputs"]), _some(graph["outputs"])
        )
    console.print(graphs)
    operators = Table("graph", "operators")
    for name, graph in facts["graphs"].items():
        operators.add_row(name, ", ".join(f"{op} {count}" for op, count in graph["operators"].items()))
    console.print(operators)
    for target, engines in facts["engines"].items():
        table = Table("engine", "size", "built by", "for", title=target)
        for name, engine in engines.items():
            size = facts["files"][engine["file"]]
            table.add_row(
                name, f"{size / 1e6:.2f} MB", engine["version"], ", ".join(engine["compute_capabilities"])
            )
        console.print(table)
    files = Table("file", "bytes")
    for name, size in facts["files"].items():
        files.add_row(name, f"{size:,}")
    console.print(files)
    for name, state in facts["reports"].items():
        console.say(f"reports/{name}: {state}")


def _shown(tensor: TensorSpec) -> str:
    shape = ", ".join(str(dim) if isinstance(dim, int) else f"{dim.name}" for dim in tensor.shape)
    return f"{tensor.name} {tensor.dtype} [{shape}]"


def _some(lines: list[str]) -> str:
    shown = lines if len(lines) <= 7 else [*lines[:6], f"... and {len(lines) - 6} more like the last"]
    return "\n".join(shown)


def _mark(passed: bool) -> Text:
    return styled(("ok", "green")) if passed else styled(("FAILED", "bold red"))
