"""Whether gaps in the position ids change an attention mask that reads them: the part that makes it is evaluated, with and without gaps.

A mask that compares ids with ids (causal by id) is the same for ascending ids, with gaps or without; one that compares them with
slots, or takes a step of more than one for the beginning of a packed sequence, is not.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gap_export.linter.call import Call, Inputs
from gap_export.linter.dataflow import Flow
from gap_export.linter.limits import MOST_FED
from gap_export.linter.part import CannotEvaluate, Part

_TOKENS, _PASTS = 8, (0, 3)
_GAPS = (
    np.arange(8) // 3,
    np.arange(8) * 2,
    40 * (np.arange(8) > 4),
    3000 * (np.arange(8) > 2),
    7 + 0 * np.arange(8),
)
"""What is added to contiguous ids [S]."""


def follows_gaps(flow: Flow, ids: ir.Value, mask: ir.Value) -> bool | None:
    """Whether a mask is another one where the ids have gaps.

    Args:
        flow: the graph.
        ids: the position-ids input.
        mask: that reads it.

    Returns:
        None where it could not be evaluated.
    """
    inputs = Inputs(flow.inputs, ids)
    tokens, rows = inputs.static("tokens") or _TOKENS, inputs.static("rows") or 1
    evaluated = False
    if tokens * rows > MOST_FED:
        return None
    try:
        for value in flow.alternatives(mask):
            part = Part(flow, value)
            if part.branches or ids not in part.inputs:
                return None
            for past in _PASTS if inputs.takes_past else _PASTS[:1]:
                call, base = Call(rows, tokens, past), np.arange(past, past + tokens)
                try:
                    baseline = part.evaluate(inputs, call, base[None].repeat(rows, axis=0))
                except CannotEvaluate:  # a graph of prompts alone, or of steps alone
                    continue
                evaluated = True
                for gaps in _GAPS:
                    gapped = (base + np.sort(np.resize(gaps, tokens)))[None]
                    if not np.array_equal(part.evaluate(inputs, call, gapped.repeat(rows, axis=0)), baseline):
                        return True
    except CannotEvaluate:
        return None
    return False if evaluated else None
