"""One graph in OpenVINO: read with the operator that it lacks, compiled, and asked what it was compiled to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.folder import Bundle
from gap_export.bundle.spec import GraphName
from gap_export.errors import MissingRequirementError, SessionError, in_one_line
from gap_export.precision import precision
from gap_export.runtime.openvino_package import ConversionExtension, ops, ov

_NEEDED = "openvino>=2026.4"
_PRODUCTS = ("FullyConnected", "MatMul", "ScaledDotProductAttention")
_FLOATING = (*_PRODUCTS, "RMS", "MVN", "RoPE")
"""What the CPU plug-in calls matrix products, and further layers that compute in a floating type whatever weights are stored in."""
_SLOTS_AXIS = 2
"""Of a cache [batch, heads, slots, head size]."""


def device_name(device: str) -> str:
    """What OpenVINO calls a device: `gpu:1` is `GPU.1`."""
    return device.upper().replace(":", ".")


def open_core(device: str, threads: int) -> ov.Core:
    """The runtime, for one session: with `TensorScatter`, and for so many threads.

    Args:
        device: as OpenVINO calls it, for example `GPU.1`.
        threads: of the CPU; 0 lets it choose.

    Raises:
        SessionError: there is no such device.
        MissingRequirementError: this OpenVINO cannot be taught an operator.
    """
    if ConversionExtension is None:
        raise MissingRequirementError(
            "has no conversion extensions, by which an operator is added that it lacks",
            subject=f"openvino {ov.__version__}",
            hint=f"pip install '{_NEEDED}'",
        )
    core = ov.Core()
    there = core.available_devices
    if device not in there and f"{device}.0" not in there:
        raise SessionError(
            f"is not there for OpenVINO, which finds {', '.join(name.lower() for name in there) or 'none'}",
            subject=f"device {device.lower().replace('.', ':')}",
            hint="choose another --device, or install the driver that OpenVINO asks for",
        )
    core.add_extension(ConversionExtension("TensorScatter", _tensor_scatter))
    if threads:
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads})
    return core


class OpenVINOGraph:
    """One graph of a bundle, compiled.

    Args:
        bundle: opened and verified.
        name: of the graph.
        core: of the session, with the operator that is added.
        device: as OpenVINO calls it.
        hint: type of activations: f32, bf16 or f16.
        path: another file with the inputs and outputs of that graph, beside the same weights, in the place of the bundle's.

    Raises:
        SessionError: OpenVINO refuses the graph, or computes in another type than was asked for.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: GraphName,
        core: ov.Core,
        device: str,
        hint: str,
        *,
        path: Path | None = None,
    ) -> None:
        path, self._spec = path or bundle.graph_path(name), bundle.manifest.graphs[name].spec
        try:
            model = core.read_model(path)
            compiled = core.compile_model(
                model, device, {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
            )
            self._request = compiled.create_infer_request()
        except RuntimeError as error:
            raise SessionError(
                f"was refused by OpenVINO {ov.__version__}: {_reason(error)}",
                subject=str(path),
                hint="run it with --backend onnxruntime, or check it with `gap-export inspect --verify`",
            ) from error
        ran = wrong_types(compiled, hint, quantised=precision(bundle.manifest.precision).quantizes)
        if ran:
            raise SessionError(
                f"would compute in {', '.join(ran)} here, and {hint} was asked for",
                subject=str(path),
                hint="choose another --precision-hint: this device has no kernels for that one",
            )
        self._name = name
        self._held: list[Any] = []

    def run(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Args:
            inputs: arrays by the names of the graph's inputs; others are left out.
            outputs: arrays that take outputs, written in place.

        Returns:
            All other outputs.

        Raises:
            SessionError: the inputs do not fit.
        """
        outputs = outputs or {}
        # A tensor does not hold the array that it lies in, nor a request the tensors that it was given.
        held = []
        try:
            for tensor in self._spec.inputs:
                held.append(_shared(np.asarray(inputs[tensor.name]), np.dtype(tensor.dtype)))
                self._request.set_tensor(tensor.name, held[-1][0])
            for name, array in outputs.items():
                held.append((ov.Tensor(array, shared_memory=True), array))
                self._request.set_tensor(name, held[-1][0])
            self._held = held
            self._request.infer()
            return {
                tensor.name: self._request.get_tensor(tensor.name).data.copy()
                for tensor in self._spec.outputs
                if tensor.name not in outputs
            }
        except RuntimeError as error:
            raise SessionError(
                f"failed in OpenVINO: {_reason(error)}",
                subject=f"graph {self._name}",
                hint="the inputs do not fit the shapes in the manifest; see `gap-export inspect`",
            ) from error


def wrong_types(compiled: Any, hint: str, *, quantised: bool) -> tuple[str, ...]:
    """Types that a compiled graph computes in, other than the one that was asked for.

    Args:
        compiled: by OpenVINO, whose hints are wishes: a processor without a type gets another without a word.
        hint: what was asked for.
        quantised: whether weights are. Their products are named after the weights, so that any layer in the type is enough.

    Returns:
        Their names; none where all is well, or where the graph has nothing to compute.
    """
    ran: dict[str, set[str]] = {"products": set(), "all": set()}
    for layer in compiled.get_runtime_model().get_ops():
        facts = layer.get_rt_info()
        kind, type_ = (facts[key].astype(str) for key in ("layerType", "runtimePrecision"))
        if kind in _FLOATING:
            ran["all"].add(type_)
        if kind in _PRODUCTS:
            ran["products"].add(type_)
    if quantised:
        return () if hint in ran["all"] else tuple(sorted(ran["all"]))
    return tuple(sorted(ran["products"] - {hint}))


def _tensor_scatter(node: Any) -> list[Any]:
    """ONNX's `TensorScatter` (opset 24) over slots: update [B, G, S, D] goes to the slots from write_index [B] on."""
    past, update, write_index = (node.get_input(number) for number in range(3))
    if (
        node.get_attribute("axis", -2) not in (-2, _SLOTS_AXIS)
        or node.get_attribute("mode", "linear") != "linear"
    ):
        raise ValueError("TensorScatter over another axis than that of the slots, or in a circle")
    shape, axis = ops.shape_of(update, "i64"), np.int64(_SLOTS_AXIS)
    length = ops.gather(shape, ops.constant(axis), ops.constant(np.int64(0)))
    offset_S = ops.range(ops.constant(np.int64(0)), length, ops.constant(np.int64(1)), "i64")
    offset_S1 = ops.unsqueeze(offset_S, ops.constant(np.array([1], np.int64)))
    first_B111 = ops.unsqueeze(write_index, ops.constant(np.array([1, 2, 3], np.int64)))
    slots_BGSD = ops.broadcast(ops.add(first_B111, offset_S1), shape)
    return ops.scatter_elements_update(past, slots_BGSD, update, ops.constant(axis)).outputs()  # type: ignore[no-any-return]


def _shared(array: NDArray[Any], dtype: np.dtype[Any]) -> tuple[ov.Tensor, NDArray[Any]]:
    """A tensor over an array's memory, and the array. Integers, which are few, are copied: NumPy has two types of 64 bits."""
    kept = np.ascontiguousarray(array)
    if dtype.kind in "iub" or kept.dtype != dtype or not kept.flags.writeable:
        kept = np.empty(array.shape, dtype)
        kept[...] = array
    return ov.Tensor(kept, shared_memory=True), kept


def _reason(error: RuntimeError) -> str:
    """The last line of what OpenVINO says: above it stand places in its own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return in_one_line(lines[-1] if lines else type(error).__name__)
