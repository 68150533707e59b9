"""Calibration: a bundle in floats, and questions for it, to the ranges that precisions with fixed scales need.

    Bundle -> Session -> Ranges

The bundle's own decoder answers, pruned as it is; what its linear layers read is watched, in prompts and in answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export import __version__, bounds
from gap_export.boxes.scenes import DEV_SEED, Case, cases
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.errors import BundleError, InputError, SessionError
from gap_export.evaluation import runner
from gap_export.evaluation.refer.dataset import Dataset
from gap_export.graph.quantize import DECODERS
from gap_export.graph.quantize.linear_layers import probed
from gap_export.precision import one_of, precision
from gap_export.progress import SILENT, Progress
from gap_export.recipe.ranges import Ranges
from gap_export.runtime.backends import Runtime, runtime
from gap_export.runtime.grounder import Grounder
from gap_export.runtime.onnxruntime_package import ort
from gap_export.runtime.ort import OnnxRuntimeSession

SCENES = "scenes"
"""Stands for generated scenes; not those that validation asks about."""
ROW = "onnxruntime"
"""The runtime whose graphs can be given more outputs."""


def calibrate(
    bundle: Bundle | Path | str,
    *,
    limit: int = 128,
    dataset: Dataset | None = None,
    backend: str = ROW,
    threads: int = 0,
    progress: Progress = SILENT,
) -> Ranges:
    """Bundle to ranges.

    Args:
        bundle: in fp32 or fp16; its pruner and share are those that are measured.
        limit: how many questions; the first of the data set.
        dataset: questions and images; generated scenes when left out.
        backend: ONNX Runtime, with device and providers where they are not its first (`onnxruntime:cuda`).
        threads: of ONNX Runtime; 0 lets it choose.
        progress: told of every question that is answered.

    Raises:
        BundleError: the bundle is not in floats.
        InputError: the data set has no images.
        SessionError: a graph does not run, or the backend is another than ONNX Runtime.
    """
    bounds.check(limit=limit, threads=threads)
    chosen = runtime(backend)
    if chosen.backend != ROW:
        raise SessionError(
            "does not tell what its layers read",
            subject=f"backend {chosen.backend}",
            hint=f"use --backend {ROW}",
        )
    bundle = open_bundle(bundle)
    manifest = bundle.manifest
    row = precision(manifest.precision)
    if row.quantizes or not row.cpu:
        raise BundleError(
            f"is in {manifest.precision}",
            subject=str(bundle.folder),
            hint="ranges are measured on a bundle built with --precision "
            + one_of(lambda each: each.cpu and not each.quantizes),
        )
    questions = list(cases(limit, DEV_SEED)) if dataset is None else _first(dataset, limit)
    session = _Watched(bundle, chosen, threads)
    # One by one: what fills short rows of a batch is not to be measured.
    progress.stage("answering", total=len(questions))
    runner.run_cases(Grounder(bundle), session, questions, batch=1, progress=progress)
    return Ranges(
        gap_export=__version__,
        bundle=manifest.name,
        family=manifest.family,
        checkpoint=manifest.checkpoint,
        samples=len(questions),
        source=SCENES if dataset is None else dataset.name,
        largest=dict(sorted(session.largest.items())),
    )


def _first(dataset: Dataset, limit: int) -> list[Case]:
    if dataset.source is None:
        raise InputError(
            "has no images", subject=dataset.name, hint="give the folder they lie in with --images"
        )
    return [
        Case(each.id, dataset.source.open(each.image), each.text, each.box)
        for each in dataset.expressions[:limit]
    ]


class _Watched(OnnxRuntimeSession):
    """A session whose decoder graphs have more outputs, which are read after every call.

    Attributes:
        largest: parameter -> largest magnitude so far of what its linear layer read.
    """

    def __init__(self, bundle: Bundle, chosen: Runtime, threads: int) -> None:
        self.largest: dict[str, float] = {}
        self._probes: dict[str, dict[str, tuple[NDArray[np.float32], list[str]]]] = {}
        super().__init__(bundle, threads=threads, device=chosen.device, providers=chosen.providers)

    def _model_of(self, name: str, options: ort.SessionOptions) -> str | bytes:
        if name not in DECODERS:
            return super()._model_of(name, options)
        model, outputs = probed(self._bundle.graph_path(name))
        self._probes[name] = {
            output: (np.zeros((), np.float32), parameters) for output, parameters in outputs.items()
        }
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._bundle.folder)
        )
        return model

    def _execute(self, name: str, binding: Any) -> None:
        probes = self._probes.get(name, {})
        for output, (number, _) in probes.items():
            binding.bind_ortvalue_output(output, ort.OrtValue.ortvalue_from_numpy(number))
        super()._execute(name, binding)
        for number, parameters in probes.values():
            for parameter in parameters:
                self.largest[parameter] = max(self.largest.get(parameter, 0.0), float(number))
