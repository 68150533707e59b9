"""Read a graph for linting: structure only, functions inlined, tensor data left where it lies."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import CycleError
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from gap_export.errors import InputError, LintError, first_line
from gap_export.files.kinds import GRAPH
from gap_export.files.read import read_bytes
from gap_export.linter.dataflow import Flow, name_of
from gap_export.linter.limits import FIELDS_FIT, MOST_FIELDS, MOST_INPUTS, MOST_NODES, Work, too_much
from gap_export.linter.structure import check_size, check_structure
from gap_export.linter.wire import count_fields

_LONGEST = 200
"""Characters of what a library says that are repeated; it may print the whole graph."""
_INVALID = "the graph is invalid: check it with onnx.checker and export it again"


def load(source: Path | str | ir.Model) -> tuple[str, Flow]:
    """Read a graph and work out its data flow.

    External tensors are referenced, never opened, so a graph whose weights are elsewhere lints as well.

    Args:
        source: an ONNX file, or a model in memory (not changed).

    Returns:
        (a name for messages, the data flow).

    Raises:
        InputError: no such file, not ONNX, damaged, or no nodes.
        LintError: functions that call themselves, nodes that the standard does not allow, that depend on each other in a circle or
            read a tensor nothing produces; or more of something than any decoder has.
    """
    subject = (source.graph.name or "graph") if isinstance(source, ir.Model) else str(source)
    model = source if isinstance(source, ir.Model) else _read(Path(source))
    if not len(model.graph):
        raise InputError("holds no nodes", subject=subject, hint="give an exported ONNX graph")
    check_size(subject, model)
    if model.functions:
        model = _inlined(subject, model.clone() if isinstance(source, ir.Model) else model)
    check_structure(subject, model)
    try:
        flow = Flow(model, work=Work(subject))
    except CycleError as error:
        raise LintError(
            f"has nodes that depend on each other in a circle, {name_of(error.args[1][0])} among them",
            subject=subject,
            hint=_INVALID,
        ) from error
    _check_dangling(subject, flow)
    return subject, flow


def _inlined(subject: str, model: ir.Model) -> ir.Model:
    try:
        InlinePass()(model)
    except Exception as error:
        # The inliner raises what it likes; all of it means a graph that cannot be expanded.
        raise LintError(
            f"has functions that cannot be expanded: {first_line(error)}",
            subject=subject,
            hint="check the file with onnx.checker",
        ) from error
    return model


def _read(path: Path) -> ir.Model:
    content = read_bytes(path, GRAPH)
    if not content:
        raise InputError("is empty", subject=str(path), hint="export the graph again")
    if len(content) > FIELDS_FIT and count_fields(content, MOST_FIELDS) > MOST_FIELDS:
        raise too_much(f"has more than {MOST_FIELDS} fields", str(path))
    try:
        with _quiet_reader():
            proto = onnx.ModelProto.FromString(content)
            _check_counts(str(path), proto)
            model: ir.Model = ir.from_proto(proto)
            ir.external_data.set_base_dir(model.graph, path.parent)
    except LintError:
        raise
    except Exception as error:  # no protobuf, or protobuf but no model: the reader fails in many ways
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(
            f"is not an ONNX file, or is damaged: {first_line(cause)[:_LONGEST]}",
            subject=str(path),
            hint="give the path of an .onnx file",
        ) from error
    return model


def _check_counts(subject: str, proto: onnx.ModelProto) -> None:
    """Refuse more nodes or inputs than are analysed, before each takes a hundred times its bytes."""
    if len(proto.graph.input) > MOST_INPUTS:
        raise too_much(f"has {len(proto.graph.input)} inputs, and lint takes {MOST_INPUTS}", subject)
    found, pending = 0, [proto.graph.node, *(function.node for function in proto.functions)]
    while pending:
        nodes = pending.pop()
        found += len(nodes)
        if found > MOST_NODES:
            raise too_much(f"has more than {MOST_NODES} nodes", subject)
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g.node)
                pending += [graph.node for graph in attribute.graphs]


def _check_dangling(subject: str, flow: Flow) -> None:
    known = set(flow.model.graph.inputs) | set(flow.model.graph.initializers.values())
    for graph in flow.model.graphs():
        known.update(graph.inputs, graph.initializers.values())
    for node in flow.nodes:
        for value in node.inputs:
            if value is None or not value.name or value in known or value.producer() is not None:
                continue
            if value.const_value is None:
                raise LintError(
                    f"reads the tensor {value.name!r}, which nothing produces",
                    subject=f"{subject}: {name_of(node)}",
                    hint=_INVALID,
                )
    for output in flow.outputs:
        if output.producer() is None and output not in known:
            raise LintError(
                "is a graph output that nothing produces",
                subject=f"{subject}: {name_of(output)}",
                hint=_INVALID,
            )


@contextmanager
def _quiet_reader() -> Iterator[None]:
    """Hold back what the reader logs and warns of invalid graphs: what matters of it is raised as one clear error."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
