"""Is it right? The bundled model through the gates and negative controls of `validate`, and beside transformers on the device.

`validate` compares with PyTorch in fp32 on the CPU, pruning included. transformers on the device answers unpruned prompts, in the bundle's own
precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu_peers import TransformersSession, load_model
from gpu_schedule import Teller
from gpu_settings import Settings
from rich.console import Console

from gap_export.boxes import scenes
from gap_export.bundle.folder import Bundle
from gap_export.evaluation import parity, runner
from gap_export.evaluation.validate import validate
from gap_export.runtime.backends import open_session
from gap_export.runtime.grounder import Grounder


def check_parity(settings: Settings, tell: Teller, *, backend: str, target: str, precision: str) -> None:
    """Facts `passed`, `report` (of `validate`) and `beside_transformers`.

    Args:
        settings: of all parts.
        tell: takes the facts.
        backend: as `open_session` takes it.
        target: what it runs: `onnx`, or the name of a library's engines.
        precision: of the bundle.

    Raises:
        GapExportError: the bundle cannot be built, or not be run.
    """
    torch.backends.cudnn.allow_tf32 = False  # the matrix products' own setting is off by default
    bundle = settings.build_bundled(target, precision)
    passed = True
    found = tell.attempt(  # first, as it takes seconds
        "beside transformers on the device", lambda: beside_transformers(settings, bundle, backend)
    )
    if found is not None:
        passed = found["passed"]
        tell.found(beside_transformers=found, passed=passed)
        show_gates(tell.console, found["gates"])
    report = validate(bundle, limit=settings.cases, backend=backend)
    tell.found(report=report.model_dump(mode="json"), passed=passed and report.ok)
    show_gates(tell.console, report.model_dump()["gates"])
    caught = [control.name for control in report.controls if control.caught]
    tell.console.print(
        f"  negative controls noticed: {len(caught)} of {len(report.controls)}; accuracy {report.measurement.accuracy:.3f},"
        f" of PyTorch {report.measurement.reference_accuracy:.3f}",
        highlight=False,
    )


def beside_transformers(settings: Settings, bundle: Bundle, backend: str) -> dict[str, Any]:
    """Nothing pruned, one prompt per call, every logit: a backend and transformers on the same device."""
    questions, grounder = list(scenes.cases(settings.peer_cases)), Grounder(bundle)
    with open_session(bundle, backend) as session:
        runs = runner.run_cases(grounder, session, questions, batch=1, keep=1.0, keep_logits=True)
    model = load_model(bundle, None, device=settings.device)
    peer: Any = TransformersSession(bundle, model, compiled=False)
    reference = runner.run_cases(grounder, peer, questions, batch=1, keep=1.0, keep_logits=True)
    measured = parity.measure(runs, reference, questions, bundle.manifest)
    gates = parity.judge(measured, bundle.manifest.gates)
    return {
        "passed": all(gate.passed for gate in gates),
        "measurement": measured.model_dump(mode="json"),
        "gates": [gate.model_dump(mode="json") for gate in gates],
    }


def show_gates(console: Console, gates: Sequence[dict[str, Any]]) -> None:
    """The gates that were not met, or that all were."""
    missed = [gate for gate in gates if not gate["passed"]]
    for gate in missed:
        said = f"{gate['name']} is {gate['measured']:.6g}, not {gate['comparison']} {gate['limit']:.6g}"
        console.print(f"  gate not met: {said}", style="red", highlight=False, markup=False)
    if not missed:
        console.print(f"  all {len(gates)} gates met")
