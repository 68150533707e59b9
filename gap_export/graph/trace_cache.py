"""Graphs that were traced before: in memory, and in a folder that all processes of a user share.

Tracing takes most of the time of a build, and builds have most graphs in common: what is kept are graphs without weights,
a few hundred kilobytes each, as ONNX. An entry is a checksum and a protobuf message, and reading one runs no code; what does
not have its checksum or is not the graph that was asked for is traced again and replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from gap_export.bundle.spec import GraphSpec
from gap_export.graph import trace
from gap_export.graph.trace_folder import TraceFolder
from gap_export.graph.trace_key import identity_of, key_of
from gap_export.modeling.components import Component
from gap_export.progress import SILENT, Progress

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traced:
    """A graph, and whether it was there already.

    Attributes:
        model: the graph; the caller's own, to be changed at will.
        cached: whether it was traced before.
    """

    model: ir.Model
    cached: bool


class Tracer:
    """`trace.graph_from_component` with a memory: components that have the same graph (`trace_key`) are traced once.

    Args:
        folder: shared with other processes; None for none.
        remembered: how many graphs are held in this process besides; the one not asked for longest is forgotten first.
        whole: trace every layer, and copy none: for comparisons. The graphs are the same, and are kept under the same keys.
    """

    def __init__(self, folder: TraceFolder | None, remembered: int = 16, *, whole: bool = False) -> None:
        self._folder, self._remembered, self._whole = folder, remembered, whole
        self._held: dict[str, bytes] = {}
        self._writable = True

    def __call__(self, component: Component, progress: Progress = SILENT) -> Traced:
        """Trace, or do without.

        Args:
            component: module without weights, and spec.
            progress: told which of the two, and once if the folder cannot be written to.

        Raises:
            TraceError: the component does not export.
        """
        name, content = component.spec.name, self._recalled(component)
        cached = content is not None
        if content is None:
            progress.stage(f"tracing {name}")
            content = _content_of(trace.graph_from_component(component, progress, whole=self._whole))
            self._keep(component, content, progress)
        else:
            progress.stage(f"taking the graph of {name} from the trace cache")
            _LOG.info("%s was traced before", name)
        self._hold(component, content)
        # Read back like one that was kept: what is built from either is then the same to the last byte.
        return Traced(_graph_of(content), cached)

    def _recalled(self, component: Component) -> bytes | None:
        identity = identity_of(component)
        held = None if identity is None else self._held.get(identity)
        if held is not None or self._folder is None:
            return held
        key = key_of(component)
        kept = None if key is None else self._folder.read(key)
        return kept if kept is not None and _is_graph_of(kept, component.spec) else None

    def _hold(self, component: Component, content: bytes) -> None:
        identity = identity_of(component)
        if identity is None:
            return
        self._held.pop(identity, None)
        self._held[identity] = content  # most recently used last
        if len(self._held) > self._remembered:
            del self._held[next(iter(self._held))]

    def _keep(self, component: Component, content: bytes, progress: Progress) -> None:
        if self._folder is None or not self._writable:
            return
        key = key_of(component)
        if key is None:
            return
        try:
            self._folder.write(key, content)
        except OSError as error:
            self._writable = False
            why = error.strerror or str(error)
            progress.stage(f"the trace cache {self._folder.path} cannot be written to: {why}")


def _content_of(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def _graph_of(content: bytes) -> ir.Model:
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(content))
    return model


def _is_graph_of(content: bytes, spec: GraphSpec) -> bool:
    """Whether this is a graph of that spec, and refers to no file."""
    try:
        model = _graph_of(content)
    except Exception:  # protobuf and onnx_ir have a dozen words for "damaged"
        return False
    inputs, outputs = model.graph.inputs, model.graph.outputs
    return (
        [value.name for value in inputs] == [tensor.name for tensor in spec.inputs]
        and len(outputs) == len(spec.outputs)
        and all(
            trace.is_fake(tensor) or not isinstance(tensor, ir.ExternalTensor) for tensor in _tensors(model)
        )
    )


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in [*model.graphs(), *(function.graph for function in model.functions.values())]:
        yield from (value.const_value for value in graph.initializers.values() if value.const_value)
        for attribute in (attribute for node in graph.all_nodes() for attribute in node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.value
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.value
