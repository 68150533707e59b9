"""Read a graph for linting: structure only, functions inlined, tensor data left where it lies."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from gap_export.errors import InputError, LintError, first_line
from gap_export.linter.dataflow import Flow, name_of


def load(source: Path | str | ir.Model) -> tuple[str, Flow]:
    """Read a graph and work out its data flow.

    External tensors are referenced, never opened, so a graph whose weights are elsewhere lints as well.

    Args:
        source: an ONNX file, or a model in memory (not changed).

    Returns:
        (a name for messages, the data flow).

    Raises:
        InputError: no such file, not ONNX, damaged, or no nodes.
        LintError: functions that call themselves, or nodes that read a tensor nothing produces.
    """
    if isinstance(source, ir.Model):
        subject, model = source.graph.name or "graph", source
        if model.functions:
            model = model.clone()
    else:
        subject, model = str(source), _read(Path(source))
    if not len(model.graph):
        raise InputError("holds no nodes", subject=subject, hint="give an exported ONNX graph")
    if model.functions:
        try:
            InlinePass()(model)
        except (
            Exception
        ) as error:  # the inliner raises what it likes; all of it means a graph that cannot be expanded
            raise LintError(
                f"has functions that cannot be expanded: {first_line(error)}",
                subject=subject,
                hint="check the file with onnx.checker",
            ) from error
    flow = Flow(model)
    _check_dangling(subject, flow)
    return subject, flow


def _read(path: Path) -> ir.Model:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(kind, subject=str(path), hint="give the path of an .onnx file")
    not_onnx = InputError(
        "is not an ONNX file, or is damaged", subject=str(path), hint="give the path of an .onnx file"
    )
    if path.stat().st_size == 0:
        raise InputError("is empty", subject=str(path), hint="export the graph again")
    try:
        with _quiet_reader():
            model = ir.load(path)
    except OSError as error:
        raise InputError(
            f"cannot be read: {first_line(error)}", subject=str(path), hint="check its permissions"
        ) from error
    except Exception as error:  # no protobuf, or protobuf but no model: the reader fails in many ways
        raise not_onnx from error
    return model


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
                    hint="the graph is invalid: check it with onnx.checker and export it again",
                )
    for output in flow.outputs:
        if output.producer() is None and output not in known:
            raise LintError(
                "is a graph output that nothing produces",
                subject=f"{subject}: {name_of(output)}",
                hint="the graph is invalid: check it with onnx.checker and export it again",
            )


@contextmanager
def _quiet_reader() -> Iterator[None]:
    """Hold back the reader's log of invalid graphs: what matters of it is raised as one clear error."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
