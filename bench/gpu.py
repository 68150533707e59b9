"""On a machine with an NVIDIA GPU: what is there, are engines right, how fast are they? See README.md.

    python bench/gpu.py [--model 7b|135m|shapes] [--precision fp16|bf16] [--keeps 1.0,0.5,0.25,0.1] [--batches 1,8]

Needs no network. Whatever is missing (a library, a compute capability, memory) is named and left out, everything else goes on. Every
backend first answers the bundled model's held-out cases beside PyTorch, with the gates of `gap-export validate`, and its negative controls;
then all take turns answering the same request at the shape that was asked for, weights random. The last line printed is the record,
also stored in bench/results/gpu.json.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import LLAVA_7B, LLAVA_135M, ensure_checkpoint
from rich.console import Console
from rich.table import Table

from gap_export.bundle.folder import Bundle
from gap_export.engine.build import supported_compute_capabilities
from gap_export.engine.library import load_library
from gap_export.errors import GapExportError
from gap_export.evaluation.latency.candidate import Candidate, candidate
from gap_export.evaluation.latency.measure import measure
from gap_export.evaluation.latency.record import BenchRecord, Device
from gap_export.pipeline.build import build
from gap_export.recipe.recipe import load_recipe
from gap_export.runtime.session import Prefilled, Spliced, VisualTokens

ENGINES = ("tensorrt", "tensorrt-rtx")
DEVICE, PROVIDER = "cuda", "CUDAExecutionProvider"
SIDE, COPIED = 8192, 2**31
"""Of the matrices that are multiplied, and bytes that are copied, for the roofline."""


@dataclass
class Report:
    """What was found, in the order it was found in.

    Attributes:
        console: words go there.
        missing: what could not be done -> why.
    """

    console: Console
    missing: dict[str, str] = field(default_factory=dict)

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """The result, or None and a line that says why there is none: one backend's trouble must not cost the others' figures."""
        began = time.perf_counter()
        self.console.print(f"{what} ...", highlight=False)
        try:
            result = work()
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.missing[what] = (
                reason if isinstance(error, GapExportError) else f"{type(error).__name__}: {reason}"
            )
            self.console.print(f"  left out: {self.missing[what]}", style="yellow", highlight=False)
            if not isinstance(error, GapExportError | ImportError | torch.cuda.OutOfMemoryError):
                self.console.print(traceback.format_exc(limit=-3), style="dim", highlight=False)
            return None
        self.console.print(f"  {time.perf_counter() - began:.1f} s")
        return result


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--model", choices=("7b", "135m", "shapes"), default="7b")
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--keeps", default="1.0,0.5,0.25,0.1")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument(
        "--cases", type=int, default=256, help="held-out cases that every backend answers beside PyTorch"
    )
    options = parser.parse_args()
    report = Report(Console(width=130))
    surroundings = gpu_of_this_machine(report)
    if surroundings is None:
        report.console.print("There is no NVIDIA GPU that PyTorch sees: nothing to measure.")
        return harness.finish(
            "gpu", {"gpu": None, "missing": report.missing}, label=options.label, ok=False, store=False
        )
    targets = [name for name in ENGINES if report.attempt(name, lambda name=name: usable(name))]
    validated = {
        backend: report.attempt(f"validate {backend}", lambda backend=backend: validated_on(backend, options))
        for backend in (*targets, "onnxruntime-cuda")
    }
    device = roofline()
    report.console.print(
        f"roofline: {device.flops_per_second / 1e12:.0f} TFLOP/s in {options.precision}, {device.bytes_per_second / 1e12:.2f} TB/s"
    )
    rows, ratios = speed(report, targets, device, options)
    show(report.console, rows)
    measured = {
        "gpu": surroundings,
        "model": options.model,
        "precision": options.precision,
        "rounds": options.rounds,
        "new_tokens": options.new_tokens,
        "roofline": device.model_dump(),
        "validated": validated,
        "rows": rows,
        "ratios": ratios,
        "missing": report.missing,
    }
    ok = bool(rows) and all(found is None or found["passed"] for found in validated.values())
    return harness.finish("gpu", measured, label=options.label, ok=ok)


# What is there


def gpu_of_this_machine(report: Report) -> dict[str, Any] | None:
    """Name, compute capability, memory; None without a GPU."""
    if not torch.cuda.is_available():
        report.missing["gpu"] = "torch.cuda.is_available() is false"
        return None
    found = torch.cuda.get_device_properties(0)
    surroundings = {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "cuda": torch.version.cuda,
    }
    report.console.print(surroundings)
    return surroundings


def usable(target: str) -> bool:
    """Whether a library is installed and builds for this GPU.

    Raises:
        GapExportError: it is not, or does not.
    """
    library = load_library(target)  # type: ignore[arg-type]
    major, minor = torch.cuda.get_device_capability()
    known = supported_compute_capabilities(library)
    if known and f"{major}.{minor}" not in known:
        raise RuntimeError(f"{library.title} builds for {', '.join(known)}, this GPU is {major}.{minor}")
    return True


def roofline() -> Device:
    """Peak of a large product in half precision, and bandwidth of a large copy; the best of ten."""
    one, other = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.float16) for _ in range(2))
    source = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(10):
            torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    multiplied, copied = best(lambda: one @ other), best(lambda: target.copy_(source))
    return Device(flops_per_second=2 * SIDE**3 / multiplied, bytes_per_second=2 * COPIED / copied, threads=0)


# Is it right


def validated_on(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """The bundled model, gates and negative controls, on one backend."""
    from gap_export.evaluation import validate

    folder = options.scratch / f"shapes-{backend}"
    onnx_only = backend == "onnxruntime-cuda"
    recipe = load_recipe("shapes").replaced(
        precision="fp32" if onnx_only else options.precision,
        targets=("onnx",) if onnx_only else ("onnx", backend),
        compute_capabilities=("current",),
    )
    build(recipe, folder, replace=True)
    if onnx_only:
        return parity_of_cuda(folder, options.cases)
    found = validate.validate(folder, limit=options.cases, backend=backend)
    return {"passed": found.ok, "report": found.model_dump(mode="json")}


def parity_of_cuda(folder: Path, cases: int) -> dict[str, Any]:
    """ONNX Runtime's CUDA provider beside its CPU provider, which `validate` holds against PyTorch."""
    from gap_export.boxes import scenes
    from gap_export.bundle.folder import open_bundle
    from gap_export.evaluation import parity, runner
    from gap_export.runtime.backends import open_session
    from gap_export.runtime.grounder import Grounder

    bundle = open_bundle(folder)
    questions, grounder = list(scenes.cases(cases)), Grounder(bundle)
    runs, reference = (
        runner.run_cases(grounder, session, questions, batch=16, keep_logits=True)
        for session in (cuda_session(bundle), open_session(bundle, "onnxruntime"))
    )
    gates = parity.judge(
        parity.measure(runs, reference, questions, bundle.manifest),
        bundle.manifest.gates,
    )
    return {
        "passed": all(gate.passed for gate in gates),
        "report": [gate.model_dump(mode="json") for gate in gates],
    }


# How fast is it


def speed(
    report: Report, targets: list[str], device: Device, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All backends in turn, for every share of tokens and every batch."""
    keeps = [float(word) for word in options.keeps.split(",")]
    batches = [int(word) for word in options.batches.split(",")]
    checkpoint = None
    if options.model != "shapes":
        config = {"7b": LLAVA_7B, "135m": LLAVA_135M}[options.model]
        named = options.scratch / f"llava-{options.model}"
        found = report.attempt("random weights", lambda: ensure_checkpoint(named, config))
        if found is None:
            return [], []
        checkpoint = found[0]
    onnx = report.attempt("build onnx", lambda: built("onnx", checkpoint, keeps, max(batches), options))
    sessions: dict[str, tuple[Bundle, Any]] = {}
    for target in targets:
        bundle = report.attempt(
            f"build {target}", lambda target=target: built(target, checkpoint, keeps, max(batches), options)
        )
        if bundle is None:
            continue
        for name, graphs in ((target, False), (f"{target}, CUDA graphs", True)):
            session = report.attempt(name, lambda b=bundle, t=target, g=graphs: engine_session(b, t, g))
            if session is not None:
                sessions[name] = (bundle, session)
    if onnx is not None:
        session = report.attempt("onnxruntime-cuda", lambda: cuda_session(onnx))
        if session is not None:
            sessions["onnxruntime-cuda"] = (onnx, session)
        for name, compiled in (("transformers sdpa", False), ("transformers compile", True)):
            session = report.attempt(
                name, lambda c=compiled: TransformersSession(onnx, checkpoint, options, compiled=c)
            )
            if session is not None:
                sessions[name] = (onnx, session)
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for batch in batches:
        asked: list[Candidate] = []
        for name, (bundle, session) in sessions.items():
            shares = [1.0] if isinstance(session, TransformersSession) else keeps
            for keep in shares:
                each = report.attempt(
                    f"warm up {name}, keep {keep:g}, batch {batch}",
                    lambda n=name, b=bundle, s=session, k=keep, rows=batch: warmed_up(n, b, s, k, rows),
                )
                if each is not None:
                    asked.append(each)
        found = report.attempt(f"measure, batch {batch}", lambda asked=asked: in_turn(asked, device, options))
        if found is not None:
            rows += [row.model_dump(mode="json") for row in found.rows]
            ratios += [
                each.model_dump(mode="json")
                for each in found.ratios
                if each.quantity in ("ttft_ms", "tpot_ms")
            ]
    return rows, ratios


def built(
    target: str, checkpoint: Path | None, keeps: list[float], batch: int, options: argparse.Namespace
) -> Bundle:
    """One bundle serves every share."""
    recipe = load_recipe("shapes" if checkpoint is None else "llava")
    shares = f"{min(keeps):g}:{sorted(keeps)[len(keeps) // 2]:g}:{max(keeps):g}"
    changes: dict[str, Any] = {
        "keep": shares if min(keeps) < max(keeps) else keeps[0],
        "precision": options.precision,
        "max_batch": batch,
        "targets": ("onnx",) if target == "onnx" else ("onnx", target),
        "compute_capabilities": ("current",),
    }
    if checkpoint is not None:
        changes |= {"checkpoint": str(checkpoint), "max_new_tokens": max(64, options.new_tokens)}
    return build(
        recipe.replaced(**changes), options.scratch / f"gpu-{options.model}-{target}", replace=True
    ).bundle


def engine_session(bundle: Bundle, target: str, cuda_graphs: bool) -> Any:
    """Engines on the GPU."""
    from gap_export.runtime.trt import TensorRTSession

    return TensorRTSession(bundle, target=target, cuda_graphs=cuda_graphs)  # type: ignore[arg-type]


def cuda_session(bundle: Bundle) -> Any:
    """The bundle in ONNX Runtime's CUDA provider: the CPU's session, with graphs and cache on the GPU.

    Raises:
        RuntimeError: this ONNX Runtime has no CUDA provider.
    """
    import onnxruntime as ort

    from gap_export.runtime.ort import OnnxRuntimeSession

    if PROVIDER not in ort.get_available_providers():
        raise RuntimeError("this ONNX Runtime has no CUDA provider (pip install onnxruntime-gpu)")

    class OnCuda(OnnxRuntimeSession):
        backend = "onnxruntime-cuda"

        def _lay_out(self, layout: Any) -> None:
            if layout != self._layout:
                super()._lay_out(layout)
                self._on_device = {
                    name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._dtype), DEVICE, 0)
                    for name, shape in self._shapes.items()
                }
                self._decodes.clear()

        def _views(self, rows: Any = None) -> Any:
            return self._on_device

    return OnCuda(bundle, providers=(PROVIDER, "CPUExecutionProvider"))


class TransformersSession:
    """The same checkpoint in transformers on the GPU, nothing pruned: sdpa with a growing cache, or compiled with a static one.

    Args:
        bundle: for sizes and prompt.
        checkpoint: folder.
        options: of the command.
        compiled: whether single tokens are compiled (`reduce-overhead`: as a CUDA graph).
    """

    def __init__(
        self, bundle: Bundle, checkpoint: Path | None, options: argparse.Namespace, *, compiled: bool
    ) -> None:
        from transformers import LlavaForConditionalGeneration

        from gap_export.checkpoint.hub import resolve
        from gap_export.precision import precision

        dtype = getattr(torch, precision(options.precision).activations.dtype)
        source = checkpoint or resolve(bundle.manifest.checkpoint)
        self._model: Any = LlavaForConditionalGeneration.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        self._model = self._model.eval().to(DEVICE)
        self.backend = f"transformers {'compile' if compiled else 'sdpa'}"
        self.capacities = bundle.manifest.cache_layout.capacities
        self._dtype, self._compiled = dtype, compiled
        self._token = bundle.manifest.prompt.image_token_id
        step = self._model.forward
        self._step = torch.compile(step, mode="reduce-overhead", fullgraph=False) if compiled else step
        self._cache: Any = None
        self.turn = nullcontext  # used by one thread
        self._visual = bundle.manifest.spec.visual_tokens

    def encode(self, pixels: Any, **_: Any) -> VisualTokens:
        """Kept for the prompt: transformers runs tower and decoder in one call."""
        values = torch.from_numpy(pixels["pixel_values"]).to(DEVICE, self._dtype)
        kept = np.tile(np.arange(self._visual), (len(values), 1))
        return VisualTokens(embeds=values, kept_indices=kept)

    def splice(self, input_ids_BT: Any, visual: VisualTokens) -> Spliced:
        """The placeholder as often as there are visual tokens."""
        from gap_export.positions import PositionPolicy, place

        rows = [
            np.r_[row[:at], [self._token] * self._visual, row[at + 1 :]]
            for row in input_ids_BT
            for at in [int(np.flatnonzero(row == self._token)[0])]
        ]
        before = np.array([int(np.flatnonzero(row == self._token)[0]) for row in input_ids_BT])
        placement = place(
            visual.kept_indices,
            text_before=before,
            text_after=input_ids_BT.shape[1] - 1 - before,
            visual_tokens=self._visual,
            policy=PositionPolicy.GAP,
        )
        return Spliced(embeds=(np.stack(rows), visual.embeds), placement=placement)

    @torch.inference_mode()
    def prefill(self, embeds: Any, placement: Any, *, reserve: int | None = None) -> Prefilled:
        """Tower, projector and decoder."""
        from transformers import DynamicCache, StaticCache

        ids, pixels = embeds
        if self._compiled:
            self._cache = StaticCache(
                config=self._model.config.text_config, max_cache_len=ids.shape[1] + (reserve or 0)
            )
        else:
            self._cache = DynamicCache()
        out = self._model(
            input_ids=torch.from_numpy(ids).to(DEVICE),
            pixel_values=pixels,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return Prefilled(out.logits[:, -1].float().cpu().numpy())

    @torch.inference_mode()
    def step(self, token_ids_B: Any, placement: Any) -> Any:
        """One token."""
        out = self._step(
            input_ids=torch.from_numpy(token_ids_B[:, None]).to(DEVICE),
            position_ids=torch.from_numpy(placement.position_ids).to(DEVICE),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float().cpu().numpy()


def warmed_up(name: str, bundle: Bundle, session: Any, keep: float, batch: int) -> Candidate:
    """A candidate that has answered twice: kernels are chosen, graphs captured, code compiled."""
    from gap_export.evaluation.latency.measure import time_request

    shares = bundle.manifest.pruning.keep_mode == "dynamic"
    each = candidate(
        f"{name}, keep {keep:g}, batch {batch}", bundle, session, batch=batch, keep=keep if shares else None
    )
    for _ in range(2):
        time_request(each, 4)
    return each


def in_turn(candidates: list[Candidate], device: Device, options: argparse.Namespace) -> BenchRecord:
    """The request of `gap-export bench`, candidate after candidate."""
    return measure(
        candidates,
        requests=options.rounds,
        new_tokens=options.new_tokens,
        warmup=3,
        device=torch.cuda.get_device_name(),
        roofline=device,
    )


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """One table."""
    table = Table("candidate", "prompt", "TTFT ms (p90)", "TPOT ms (p90)", "of roofline", "its tokens")
    for row in rows:
        spans = [f"{row[q]['p50']:.2f} ({row[q]['p90']:.2f})" for q in ("ttft_ms", "tpot_ms")]
        shares = [
            "-" if row[f] is None else f"{row[f]:.2f}"
            for f in ("roofline_fraction", "tpot_roofline_fraction")
        ]
        table.add_row(row["name"], str(row["prompt_slots"]), *spans, *shares)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
