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
from gap_export.graph.trace_key import key_of
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
    """

    def __init__(self, folder: TraceFolder | None, remembered: int = 16) -> None:
        self._folder, self._remembered = folder, remembered
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
        name, key = component.spec.name, key_of(component)
        if key is not None and (kept := self._kept(key, component.spec)) is not None:
            progress.stage(f"taking the graph of {name} from the trace cache")
            _LOG.info("%s was traced before", name)
            return Traced(kept, cached=True)
        progress.stage(f"tracing {name}")
        content = _content_of(trace.graph_from_component(component))
        if key is not None:
            self._hold(key, content)
            self._keep(key, content, progress)
        # Read back like one that was kept: what is built from either is then the same to the last byte.
        return Traced(_graph_of(content), cached=False)

    def _kept(self, key: str, spec: GraphSpec) -> ir.Model | None:
        content = self._held.get(key)
        if content is None and self._folder is not None:
            content = self._folder.read(key)
        if content is None:
            return None
        try:
            graph = _graph_of(content)
        except Exception:  # protobuf and onnx_ir have a dozen words for "damaged"
            return None
        if not _fits(graph, spec):
            return None
        self._hold(key, content)
        return graph

    def _hold(self, key: str, content: bytes) -> None:
        self._held.pop(key, None)
        self._held[key] = content  # most recently used last
        if len(self._held) > self._remembered:
            del self._held[next(iter(self._held))]

    def _keep(self, key: str, content: bytes, progress: Progress) -> None:
        if self._folder is None or not self._writable:
            return
        try:
            self._folder.write(key, content)
        except OSError as error:
            self._writable = False
            progress.stage(
                f"the trace cache {self._folder.path} cannot be written to: {error.strerror or error}"
            )


def _content_of(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def _graph_of(content: bytes) -> ir.Model:
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(content))
    return model


def _fits(model: ir.Model, spec: GraphSpec) -> bool:
    """Whether this is a graph of that spec, and refers to no file."""
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
