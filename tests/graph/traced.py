"""A component's graph as bytes, and how it was made."""

from __future__ import annotations

import logging
from typing import NamedTuple

import onnx_ir as ir

from gap_export.graph import trace
from gap_export.modeling.components import Component
from tests.recorded import Recorded


class Traced(NamedTuple):
    """A graph.

    Attributes:
        content: as it would be kept in the trace cache.
        how: whether its layers are copies, as the log says.
        told: to the caller while it was traced.
    """

    content: bytes
    how: str
    told: list[str]


def traced(component: Component, *, whole: bool = False) -> Traced:
    """Trace.

    Args:
        component: left as it is.
        whole: every layer, in any case.
    """
    told, logger, records = Recorded(), logging.getLogger(trace.__name__), list[logging.LogRecord]()
    handler, level = logging.Handler(logging.INFO), logger.level
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        model = trace.graph_from_component(component, told, whole=whole)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    (record,) = records
    assert isinstance(record.args, tuple)
    content = ir.to_proto(model).SerializeToString(deterministic=True)
    return Traced(content, str(record.args[2]), told.messages)
