"""One graph in ONNX Runtime: loaded with the fusions switched off that drop ids, and held against the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from gap_export.bundle.folder import Bundle
from gap_export.bundle.interface import interface_fault
from gap_export.bundle.onnx_header import Interface, Tensor
from gap_export.errors import GapExportError, SessionError, first_line, in_one_line
from gap_export.precision import precision
from gap_export.runtime.onnxruntime_package import ort
from gap_export.runtime.ort_providers import add_providers, check_assignment
from gap_export.runtime.providers import CPU, Provider

_FATAL = 4
"""ONNX Runtime's level of logging at which it says nothing of what it raises."""

# Fusions that put rotary into attention read only the first position id (see docs/positions.md).
_FORBIDDEN_FUSIONS = ["GroupQueryAttentionFusion"]

_ELEMENTS = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
"""What ONNX Runtime calls an element type -> what specs call it."""


def load_graph(
    bundle: Bundle,
    name: str,
    threads: int,
    model_of: Callable[[str, ort.SessionOptions], str | bytes],
    device: str = "cpu",
    providers: Sequence[Provider] = (),
) -> ort.InferenceSession:
    """Load one graph of a bundle.

    Args:
        bundle: opened and verified.
        name: of the graph.
        threads: intra-op; 0 lets ONNX Runtime choose.
        model_of: path of a graph, or content that was changed on purpose, to be looked into; may change the options.
        device: that a provider computes on.
        providers: that compute; the CPU where there are none.

    Raises:
        SessionError: ONNX Runtime refuses it, it is another than the manifest says, or a decoder's nodes were left to the CPU by a provider.
        MissingRequirementError: a provider is not there.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if threads > (os.cpu_count() or 1):
        # Threads that wait spin for a while, and keep those from running that they wait for.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # What goes wrong is raised too; what the runtime says beside it, of sessions and of its allocators, is in colours.
    options.log_severity_level = _FATAL
    ort.set_default_logger_severity(_FATAL)
    # Four-bit weights are multiplied with activations of eight bits, block by block, instead of being unpacked.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    try:
        computing = add_providers(options, providers, device)
        model = model_of(name, options)
        session = ort.InferenceSession(
            model,
            options,
            providers=None if computing else [CPU],
            disabled_optimizers=_FORBIDDEN_FUSIONS,
        )
    except GapExportError:
        raise
    except Exception as error:  # pybind exceptions of ONNX Runtime share no public base class
        raise SessionError(
            f"was refused by ONNX Runtime {ort.__version__}: {first_line(error)}",
            subject=str(bundle.graph_path(name)),
            hint="check the bundle with `gap-export inspect --verify`, or build it again with this version",
        ) from error
    check_assignment(session, name, computing, providers)
    found = _interface_of(session)
    fault = interface_fault(bundle.manifest.graphs[name].spec, found) if isinstance(model, str) else None
    if fault is not None:
        raise SessionError(
            in_one_line(fault),
            subject=str(bundle.graph_path(name)),
            hint="graph and manifest do not belong together: build the bundle again",
        )
    return session


def check_kernels(bundle: Bundle) -> None:
    """Refuse a bundle whose precision ONNX Runtime has no CPU kernels for.

    Raises:
        SessionError: it has none.
    """
    chosen = bundle.manifest.precision
    if not precision(chosen).cpu:
        raise SessionError(
            f"{chosen} graphs have no CPU kernels in ONNX Runtime",
            subject=str(bundle.folder),
            hint="run it with --device cuda or in TensorRT, on a GPU, or build with --precision fp32",
        )


def _interface_of(session: ort.InferenceSession) -> Interface:
    """What the loaded graph itself takes and gives."""
    inputs, outputs = (
        tuple(Tensor(value.name, _ELEMENTS.get(value.type, value.type), tuple(value.shape)) for value in side)
        for side in (session.get_inputs(), session.get_outputs())
    )
    return Interface(inputs, outputs)
