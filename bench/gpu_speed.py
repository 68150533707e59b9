"""How fast is it? Bundles beside transformers on the device: all that is compared answers in the same rounds of one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gpu_device import device_facts, roofline
from gpu_peers import TransformersSession, load_model
from gpu_schedule import Teller
from gpu_settings import CONFIGS, LARGEST_BATCH, Settings
from harness import ensure_checkpoint
from rich.console import Console
from rich.table import Table

from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.bundle.manifest import EngineTarget
from gap_export.evaluation.latency.candidate import Candidate, candidate
from gap_export.evaluation.latency.measure import measure, time_request
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import encode
from gap_export.runtime.trt import TensorRTSession

MAIN_KEEPS, OTHER_KEEPS = (1.0, 0.25), (0.5, 0.1)
_WARM_REQUESTS = 2
_RATIOS = ("ttft_ms", "tpot_ms")


def prepare_model(settings: Settings, tell: Teller) -> None:
    """Random weights, and the bundle that ONNX Runtime runs: fact `weight_bytes`.

    Raises:
        GapExportError: it cannot be built.
        SystemExit: no space, or something else lies there.
    """
    if settings.checkpoint is not None:
        _, size = ensure_checkpoint(settings.checkpoint, CONFIGS[settings.model])
        tell.found(weight_bytes=size)
        tell.console.print(f"  random weights, {size / 1e9:.1f} GB")
    settings.build_measured("onnx")


def measure_beside_transformers(settings: Settings, tell: Teller) -> None:
    """Facts `rows`, `ratios` (first without, then with the compiled model, which takes longest) and `agreement`."""
    bundle = open_bundle(settings.bundle_folder("onnx"))
    ours = _open(tell, settings, bundle, settings.onnxruntime)
    candidates = _candidates(settings, tell, bundle, {settings.onnxruntime: ours}, MAIN_KEEPS, 1)
    model = tell.attempt(
        "transformers", lambda: load_model(bundle, settings.checkpoint, device=settings.device)
    )
    if model is not None:
        sdpa = TransformersSession(bundle, model, compiled=False)
        candidates += _candidates(settings, tell, bundle, {sdpa.backend: sdpa}, (1.0,), 1)
        if ours is not None:
            agreement = tell.attempt("agreement", lambda: first_logits_agree(bundle, ours, sdpa))
            if agreement is not None:
                tell.console.print(f"  {agreement}", highlight=False)
                tell.found(agreement=agreement)
    _measure(settings, tell, candidates)
    if model is not None:
        peer = TransformersSession(bundle, model, compiled=True)
        compiled = _candidates(settings, tell, bundle, {peer.backend: peer}, (1.0,), 1)
        if compiled:
            _measure(settings, tell, [*candidates, *compiled])


def measure_engines(settings: Settings, tell: Teller, *, target: EngineTarget) -> None:
    """Facts `rows` and `ratios` of a library's engines, with and without CUDA graphs, beside ONNX Runtime.

    Raises:
        GapExportError: they cannot be built.
    """
    bundle = settings.build_measured(target)
    sessions = {
        settings.onnxruntime: _open(tell, settings, bundle, settings.onnxruntime),
        target: _open(tell, settings, bundle, target),
        f"{target}, CUDA graphs": tell.attempt(
            f"{target}, CUDA graphs", lambda: TensorRTSession(bundle, target=target, cuda_graphs=True)
        ),
    }
    _measure(settings, tell, _candidates(settings, tell, bundle, sessions, MAIN_KEEPS, 1))


def measure_other_requests(settings: Settings, tell: Teller) -> None:
    """Other shares of tokens, and batches: facts `rows` and `ratios` (batch 1) and `batch_rows` and `batch_ratios`."""
    bundle = open_bundle(settings.bundle_folder("onnx"))
    ours = {settings.onnxruntime: _open(tell, settings, bundle, settings.onnxruntime)}
    _measure(settings, tell, _candidates(settings, tell, bundle, ours, OTHER_KEEPS, 1))
    candidates = _candidates(settings, tell, bundle, ours, MAIN_KEEPS, LARGEST_BATCH)
    model = tell.attempt(
        "transformers", lambda: load_model(bundle, settings.checkpoint, device=settings.device)
    )
    if model is not None:
        sdpa = TransformersSession(bundle, model, compiled=False)
        candidates += _candidates(settings, tell, bundle, {sdpa.backend: sdpa}, (1.0,), LARGEST_BATCH)
    _measure(settings, tell, candidates, prefix="batch_")


def first_logits_agree(bundle: Bundle, one: Any, other: Any) -> dict[str, Any]:
    """Whether two sessions compute the same of the request that is timed, nothing pruned: cosine of the first logits, and the first token."""
    found = []
    for session in (one, other):
        each = candidate("any", bundle, session, keep=1.0)
        visual = encode(session, each.images, keep_counts=each.keep_counts)
        spliced = session.splice(each.input_ids_BT, visual)
        logits_BV = session.prefill(spliced.embeds, spliced.placement, reserve=1).logits
        found.append(np.asarray(logits_BV[0], np.float64).copy())
    a, b = found
    return {
        "cosine": round(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))), 6),
        "same_first_token": bool(a.argmax() == b.argmax()),
    }


def show_rows(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """One table."""
    table = Table("candidate", "prompt", "TTFT ms (p90)", "TPOT ms (p90)", "of roofline", "its tokens")
    for row in rows:
        spans = [f"{row[quantity]['p50']:.2f} ({row[quantity]['p90']:.2f})" for quantity in _RATIOS]
        shares = [
            "-" if row[name] is None else f"{row[name]:.2f}"
            for name in ("roofline_fraction", "tpot_roofline_fraction")
        ]
        table.add_row(row["name"], str(row["prompt_slots"]), *spans, *shares)
    console.print(table)


def _open(tell: Teller, settings: Settings, bundle: Bundle, backend: str) -> Any:
    return tell.attempt(f"load {backend}", lambda: open_session(bundle, backend))


def _candidates(
    settings: Settings,
    tell: Teller,
    bundle: Bundle,
    sessions: dict[str, Any],
    keeps: Sequence[float],
    batch: int,
) -> list[Candidate]:
    """Every session with every share, warm; those that fail are left out."""
    made = []
    for name, session in sessions.items():
        for keep in keeps if session is not None else ():
            called = f"{name}, keep {keep:g}, batch {batch}"
            each = tell.attempt(
                f"warm up {called}",
                lambda called=called, session=session, keep=keep: _warmed_up(
                    candidate(called, bundle, session, batch=batch, keep=keep), settings.new_tokens
                ),
            )
            if each is not None:
                made.append(each)
    return made


def _warmed_up(each: Candidate, new_tokens: int) -> Candidate:
    """A candidate that has answered the very request: kernels are chosen, graphs captured, code compiled for its shapes and no others."""
    for _ in range(_WARM_REQUESTS):
        time_request(each, new_tokens)
    return each


def _measure(settings: Settings, tell: Teller, candidates: Sequence[Candidate], prefix: str = "") -> None:
    """The request of `gap-export bench`, all candidates in turn."""
    if not candidates:
        return
    measured = measure(
        candidates,
        requests=settings.rounds,
        new_tokens=settings.new_tokens,
        warmup=2,
        device=device_facts(settings)["name"],
        roofline=roofline(settings.device),
    )
    rows = [row.model_dump(mode="json") for row in measured.rows]
    ratios = [each.model_dump(mode="json") for each in measured.ratios if each.quantity in _RATIOS]
    tell.found(**{f"{prefix}rows": rows, f"{prefix}ratios": ratios})
    show_rows(tell.console, rows)
