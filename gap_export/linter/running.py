"""A decoder in ONNX Runtime, every input but the ids made for it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.errors import first_line
from gap_export.linter.call import SMALLEST_VOCABULARY, Call, CannotFeed, Inputs
from gap_export.linter.dataflow import Flow, integer, is_float, is_op, name_of, operand
from gap_export.linter.isolated import Failed, Session, bytes_of

Array = NDArray[Any]

HIGHEST_ID = 4100
"""Ids are told apart up to here, where no table ends before."""
_QUANTIZES_ROWS_TOGETHER = "DynamicQuantizeLinear"


class NotRun(Exception):
    """There is no measurement; the text says why."""


@dataclass(frozen=True)
class Feeding:
    """What one run is given beyond its extents.

    Attributes:
        ids: int64 [B, S].
        disturbed: a token whose content is another one than in the baseline.
        hidden: tokens that the mask hides.
        kept: of the tokens of a longer call, those that this one has.
        longer: that call.
        seed: of what tokens and past hold.
    """

    ids: Array
    disturbed: int | None = None
    hidden: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    longer: Call | None = None
    seed: int = 0


class Running:
    """A decoder in ONNX Runtime.

    Args:
        session: the graph in ONNX Runtime.
        flow: its data flow.
        ids: the position-ids input, if there is one.
        tokens: inputs that carry the tokens.

    Attributes:
        inputs: how its inputs are made.
        runs: how many there were.
        rounds_together: whether activations of all tokens are rounded by one scale, so that each has a hair of influence on all.
        longest_ids: rows of the shortest table that the graph looks ids up in; beyond it there is nothing to tell apart.
    """

    def __init__(
        self, session: Session, flow: Flow, ids: ir.Value | None, tokens: Iterable[ir.Value] = ()
    ) -> None:
        self.open_session, self._fed = session, flow.inputs
        self.inputs = Inputs(flow.inputs, ids, tokens)
        self._learn_heads(flow)
        self.runs = 0
        self.rounds_together = any(n.op_type == _QUANTIZES_ROWS_TOGETHER for n in flow.nodes)
        tables = [
            node.inputs[0].shape[0]
            for node in flow.nodes
            if is_op(node, "Gather")
            and node.inputs[0] is not None
            and node.inputs[1] is not None
            and flow.is_constant(node.inputs[0])
            and node.inputs[0].shape
            and flow.facts(node.inputs[1]).values & flow.bit(ids)
        ]
        self.longest_ids = min((n for n in tables if isinstance(n, int)), default=HIGHEST_ID + 2)
        logits = [v for v in flow.outputs if name_of(v) == "logits"] or [
            v for v in flow.outputs if is_float(v) is True and not self.inputs.is_past(v)
        ]
        if not logits:
            raise NotRun("it gives out no logits")
        self._logits = name_of(logits[0])
        self._tokens = next(iter(self.inputs.tokens), None)
        masks = [
            v for v in self._fed if "mask" in name_of(v).lower() and v.shape is not None and len(v.shape) == 2
        ]
        self.mask = masks[0] if len(masks) == 1 else None

    def _learn_heads(self, flow: Flow) -> None:
        """The extent of a head, where the inputs leave it open and a fused attention tells it."""
        for node in flow.nodes:
            heads = integer(node, "kv_num_heads", 0)
            query, key, past = (operand(node, place) for place in (0, 1, 3))
            if not heads or past is None or past.shape is None:
                continue
            if key is None:  # queries, keys and values are packed into one
                key, heads = query, integer(node, "num_heads", 0) + 2 * heads
            width = key.shape[-1] if key is not None and key.shape is not None else None
            if isinstance(width, int) and heads > 0:
                self.inputs.learn(past.shape[-1], width // heads)

    def logits(self, call: Call, feeding: Feeding) -> Array:
        """Logits float64 [B, S or 1, V] of one run.

        Raises:
            NotRun: ONNX Runtime refuses.
        """
        try:
            feeds = {name_of(v): self.inputs.feed(v, call, feeding.ids, feeding.seed) for v in self._fed}
        except CannotFeed as error:
            raise NotRun(str(error)) from error
        if feeding.disturbed is not None and self._tokens is not None:
            content = feeds[name_of(self._tokens)] = feeds[name_of(self._tokens)].copy()
            token = (
                content[..., feeding.disturbed]
                if content.dtype.kind in "iu"
                else content[:, feeding.disturbed]
            )
            token[...] = (token + 1) % SMALLEST_VOCABULARY if content.dtype.kind in "iu" else -token
        if feeding.longer is not None and self._tokens is not None:
            content = self.inputs.feed(self._tokens, feeding.longer, feeding.ids, feeding.seed)
            axis = 1 if content.ndim > 1 else 0
            feeds[name_of(self._tokens)] = np.take(content, feeding.kept, axis=axis)
        if feeding.hidden and self.mask is not None:
            mask = feeds[name_of(self.mask)] = feeds[name_of(self.mask)].copy()
            mask[:, [call.past + token for token in feeding.hidden]] = 0
        self.runs += 1
        try:
            (found,) = self.open_session.run([self._logits], feeds)
        except Failed as error:
            raise NotRun(f"ONNX Runtime refuses the inputs made for it: {_plain(error)}") from error
        logits = np.asarray(found).astype(np.float64)
        if logits.ndim not in (2, 3) or not logits.size:
            raise NotRun(f"its logits are of shape {list(logits.shape)}")
        if not np.isfinite(logits).all():
            raise NotRun("its logits are not finite numbers")
        return np.asarray(logits[:, None] if logits.ndim == 2 else logits)


def open_session(source: Path | str | ir.Model, model: ir.Model) -> Session:
    """The graph in ONNX Runtime, as it stands: without the fusion that drops ids on the way.

    Args:
        source: a file, or a model in memory.
        model: what was read from it.

    Raises:
        NotRun: it is not installed, or does not take the graph.
    """
    if find_spec("onnxruntime") is None:
        raise NotRun("onnxruntime is not installed")
    try:
        if not isinstance(source, ir.Model):
            return Session(Path(source), bytes_of(Path(source), model))
        with tempfile.TemporaryDirectory(prefix="gap-export-lint-") as folder:
            path = Path(folder) / "graph.onnx"
            ir.save(source.clone(), path, external_data="weights.bin")
            return Session(path, sum(file.stat().st_size for file in Path(folder).iterdir()))
    except Failed as error:
        raise NotRun(f"ONNX Runtime does not take the graph: {_plain(error)}") from error
    except (OSError, ValueError) as error:  # external weights that cannot be copied
        raise NotRun(f"it cannot be written for ONNX Runtime: {first_line(error)}") from error


def _plain(error: Exception) -> str:
    """What ONNX Runtime said, without its codes."""
    return re.sub(r"^(\[ONNXRuntimeError\] : \d+ : )?([A-Z_]+ : )?", "", first_line(error)).strip()
