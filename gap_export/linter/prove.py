"""Run a decoder in ONNX Runtime with gapped and with renumbered ids, and see whether its logits follow.

The graph is run whole, as a user runs it; every input but the ids is made from its name, type and shape (`call`). Nothing is compared with
a reference model. What must hold is read off the graph's own answers:

    a gap moves what comes after it    ids [0, 1, 2, 6, 7, 8]: logits before the gap stay, those after it move, wherever the gap is
    ids are told apart                 logits of a token with id 300 are not those with id 44, nor 2049's those of 2050
    a gap hides nothing                a token that reached another token's logits without gaps reaches them with gaps
    a past is a distance away          where there is a past, all new ids further on move the logits
    each row has its own ids           a gap in one row of a batch moves that row's logits, and no other's
    gaps stand for what was dropped    where a mask can hide tokens, survivors with gapped ids have the logits of the whole sequence, the
                                       others hidden by the mask

The last one needs a mask input that really hides: that is seen from whether a hidden token still has any influence.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.errors import first_line
from gap_export.linter.call import SMALLEST_VOCABULARY, Call, Inputs, is_token
from gap_export.linter.dataflow import Flow, is_float, is_op, name_of, operand
from gap_export.linter.report import Proof

Array = NDArray[Any]

_CALLS = (Call(1, 6, 0), Call(1, 6, 3), Call(1, 1, 3))
"""Tried in turn: a prompt, tokens after a past, a step."""
_GAP = 3
_NOTHING = 1e-6
"""Of the largest logit; smaller changes are none."""
_LEAK = 0.25
"""Of what a gap moves; tokens and rows that it must not touch may move by less, for kernels that round differently."""
_ALIKE = 0.05
"""Of what the gaps move; survivors that differ from the whole sequence by more are not its survivors."""
_HIGH_IDS = (44, 300, 1001, 1002, *range(2049, 2053), *range(4093, 4098))
"""300 and 44 are alike in eight bits, 2049 and 2050 in float16, 1001 and 1002 in bfloat16."""
_LARGEST_STATIC = 512
_QUANTIZES_ROWS_TOGETHER = "DynamicQuantizeLinear"


class NotRun(Exception):
    """There is no measurement; the text says why."""


def prove(source: Path | str | ir.Model, flow: Flow, ids: ir.Value | None) -> Proof:
    """Measure whether the logits of a decoder follow its position ids.

    Args:
        source: the graph: a file, or a model in memory.
        flow: its data flow.
        ids: the position-ids input.

    Returns:
        What was measured, or why nothing was.
    """
    try:
        if ids is None:
            raise NotRun("there is no position-ids input that could be fed")
        decoder = _Running(_session(source), flow, ids)
        return _measure(decoder)
    except NotRun as reason:
        return Proof(outcome="not run here", sentence=str(reason))


@dataclass(frozen=True)
class _Feeding:
    """What one run is given beyond its extents.

    Attributes:
        ids: int64 [B, S].
        disturbed: a token whose content is another one than usual.
        hidden: tokens that the mask hides.
        kept: of the tokens of a longer call, those that this one has.
        longer: that call.
    """

    ids: Array
    disturbed: int | None = None
    hidden: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    longer: Call | None = None


class _Running:
    """A decoder in ONNX Runtime.

    Args:
        session: of onnxruntime.
        flow: its data flow.
        ids: the position-ids input.

    Attributes:
        inputs: how its inputs are made.
        runs: how many there were.
        rounds_together: whether activations of all tokens are rounded by one scale, so that each has a hair of influence on all.
        longest_ids: rows of the shortest table that the graph looks ids up in; beyond it there is nothing to tell apart.
    """

    def __init__(self, session: Any, flow: Flow, ids: ir.Value) -> None:
        self._session, self._fed = session, flow.inputs
        self.inputs = Inputs(flow.inputs, ids)
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
        self.longest_ids = min((n for n in tables if isinstance(n, int)), default=max(_HIGH_IDS) + 2)
        logits = [v for v in flow.outputs if name_of(v) == "logits"] or [
            v for v in flow.outputs if is_float(v) is True and not self.inputs.is_past(v)
        ]
        if not logits:
            raise NotRun("it gives out no logits")
        self._logits = name_of(logits[0])
        self._tokens = next((v for v in self._fed if is_token(v)), None)
        masks = [
            v for v in self._fed if "mask" in name_of(v).lower() and v.shape is not None and len(v.shape) == 2
        ]
        self.mask = masks[0] if len(masks) == 1 else None

    def _learn_heads(self, flow: Flow) -> None:
        """The extent of a head, where the inputs leave it open and a fused attention tells it."""
        for node in flow.nodes:
            heads = node.attributes.get_int("kv_num_heads", 0)
            key, past = operand(node, 1), operand(node, 3)
            if (
                heads
                and key is not None
                and past is not None
                and key.shape is not None
                and past.shape is not None
            ):
                width = key.shape[-1]
                if isinstance(width, int):
                    self.inputs.learn(past.shape[-1], width // heads)

    def logits(self, call: Call, feeding: _Feeding) -> Array:
        """Logits float64 [B, S or 1, V] of one run.

        Raises:
            NotRun: ONNX Runtime refuses.
        """
        feeds = {name_of(v): self.inputs.feed(v, call, feeding.ids) for v in self._fed}
        if feeding.disturbed is not None and self._tokens is not None:
            content = feeds[name_of(self._tokens)] = feeds[name_of(self._tokens)].copy()
            token = (
                content[..., feeding.disturbed]
                if content.dtype.kind in "iu"
                else content[:, feeding.disturbed]
            )
            token[...] = (token + 1) % SMALLEST_VOCABULARY if content.dtype.kind in "iu" else -token
        if feeding.longer is not None and self._tokens is not None:
            content = self.inputs.feed(self._tokens, feeding.longer, feeding.ids)
            axis = 1 if content.ndim > 1 else 0
            feeds[name_of(self._tokens)] = np.take(content, feeding.kept, axis=axis)
        if feeding.hidden and self.mask is not None:
            mask = feeds[name_of(self.mask)] = feeds[name_of(self.mask)].copy()
            mask[:, [call.past + token for token in feeding.hidden]] = 0
        self.runs += 1
        try:
            (found,) = self._session.run([self._logits], feeds)
        except Exception as error:
            raise NotRun(f"ONNX Runtime refuses the inputs made for it: {_plain(error)}") from error
        logits = np.asarray(found).astype(np.float64)
        if not np.isfinite(logits).all():
            raise NotRun("its logits are not finite numbers")
        return np.asarray(logits[:, None] if logits.ndim == 2 else logits)


def _measure(decoder: _Running) -> Proof:
    largest, whole = 0.0, False
    for call, usual in _calls(decoder):
        case = _Case(decoder, call, usual)
        for check in (_moves, _hides, _told_apart, _whole_sequence, _rows):
            wrong = check(case)
            largest, whole = max(largest, case.largest), whole or case.whole
            if wrong:
                return Proof(
                    outcome="do not survive", sentence=wrong, moved=largest, whole=whole, runs=decoder.runs
                )
    like = ", and survivors have the logits of the whole sequence with the others hidden" if whole else ""
    sentence = f"gaps move the logits after them by {largest:.1e} of the largest, wherever they are, and hide no token{like}"
    return Proof(outcome="survive", sentence=sentence, moved=largest, whole=whole, runs=decoder.runs)


class _Case:
    """One call, and what it answers with contiguous ids.

    Args:
        decoder: that is run.
        call: extents.
        usual: its logits with contiguous ids.

    Attributes:
        base: int64 [B, S], contiguous ids.
        least: smaller changes of a logit are none.
        largest: change of a logit by gaps so far, as a share of the largest logit.
        whole: whether survivors were compared with the whole sequence.
    """

    def __init__(self, decoder: _Running, call: Call, usual: Array) -> None:
        self.decoder, self.call, self.usual = decoder, call, usual
        self.base, self.largest, self.whole = _base(call), 0.0, False
        self.scale = float(np.abs(usual).max()) or 1.0
        # A runtime need not repeat itself to the last bit.
        self.least = max(_NOTHING * self.scale, 4 * float(self.moved(self.base).max()))

    def run(self, ids: Array, disturbed: int | None = None, hidden: tuple[int, ...] = ()) -> Array:
        """Logits [B, S or 1, V]."""
        return self.decoder.logits(self.call, _Feeding(ids, disturbed, hidden))

    def moved(self, ids: Array) -> Array:
        """By how much other ids change the logits, for each token that has any."""
        return np.asarray(np.abs(self.run(ids) - self.usual).max(axis=(0, 2)))


def _moves(case: _Case) -> str | None:
    """Whether a gap moves the logits after it and none before it."""
    call = case.call
    for gap in range(1 if call.past == 0 else 0, call.tokens):
        by = case.moved(case.base + _GAP * (np.arange(call.tokens) >= gap))
        every = len(by) == call.tokens
        after, before = (by[gap:], by[:gap]) if every else (by, by[:0])
        case.largest = max(case.largest, float(by.max()) / case.scale)
        if (after <= case.least).all():
            return f"a gap before token {gap} of {call.tokens} moves no logits"
        if not case.decoder.rounds_together and (before > _LEAK * after.max()).any():
            return f"a gap before token {gap} of {call.tokens} moves the logits of earlier tokens"
    return None


def _base(call: Call) -> Array:
    return np.arange(call.past, call.past + call.tokens)[None].repeat(call.rows, axis=0)


def _calls(decoder: _Running) -> list[tuple[Call, Array]]:
    """A prompt and a call after a past, those of them that the runtime accepts, and their logits with contiguous ids."""
    tokens, rows = decoder.inputs.static("tokens"), decoder.inputs.static("rows")
    if (tokens or 0) > _LARGEST_STATIC:
        raise NotRun(f"it takes {tokens} tokens at a time")
    refused: NotRun | None = None
    accepted: list[tuple[Call, Array]] = []
    for tried in _CALLS:
        call = Call(rows or 1, tokens or tried.tokens, tried.past)
        one_alone = call.tokens == 1 and call.past == 0
        had = any(each.past == call.past for each, _ in accepted)
        if one_alone or had or (call.past and not decoder.inputs.takes_past):
            continue
        try:
            accepted.append((call, decoder.logits(call, _Feeding(_base(call)))))
        except NotRun as reason:
            refused = refused or reason
    if not accepted:
        raise refused or NotRun(
            "it takes one token and no past, so that there is no distance for a gap to change"
        )
    return accepted


def _told_apart(case: _Case) -> str | None:
    """Whether the last token has other logits for other ids, high ones too, as far up as tables go."""
    found: dict[int, Array] = {}
    for last in _HIGH_IDS:
        ids = case.base.copy()
        ids[:, -1] = last
        try:
            found[last] = case.run(ids)
        except NotRun:  # beyond the end of a table
            continue
    for a, b in itertools.combinations(found, 2):
        same = np.abs(found[a] - found[b]).max() <= case.least
        if same and a + 1 < case.decoder.longest_ids:
            return f"ids {a} and {b} give the same logits"
    return None


def _hides(case: _Case) -> str | None:
    """Whether gaps change which token reaches which logits."""
    tokens, least = case.call.tokens, case.least
    if case.decoder.rounds_together:
        return None
    gapped = case.base + _GAP * np.arange(tokens)
    with_gaps = case.run(gapped)
    for token in range(tokens):
        reached = np.abs(case.run(case.base, token) - case.usual).max(axis=(0, 2)) > least
        still = np.abs(case.run(gapped, token) - with_gaps).max(axis=(0, 2)) > least
        if (reached != still).any():
            return f"with gaps other tokens see token {token} of {tokens} than without"
    return None


def _whole_sequence(case: _Case) -> str | None:
    """Whether survivors have the logits that they have in the whole sequence, the others hidden by the mask."""
    decoder, call = case.decoder, case.call
    fixed = decoder.inputs.static("tokens") is not None
    if decoder.mask is None or fixed or decoder.rounds_together or call.tokens < 6:
        return None
    kept, dropped = (0, 1, 3, 5), (2, 4)
    pruned = Call(call.rows, len(kept), call.past)
    ids = call.past + np.array([kept]).repeat(call.rows, axis=0)
    try:
        whole = case.run(case.base, hidden=dropped)
        disturbed = case.run(case.base, dropped[0], dropped)
        survivors = decoder.logits(pruned, _Feeding(ids, kept=kept, longer=call))
        renumbered = decoder.logits(pruned, _Feeding(_base(pruned), kept=kept, longer=call))
    except NotRun:
        return None
    rows = kept if whole.shape[1] == call.tokens else (-1,)
    whole, disturbed = whole[:, rows], disturbed[:, rows]
    if np.abs(whole - disturbed).max() > case.least or whole.shape != survivors.shape:
        return None  # the mask does not hide
    case.whole = True
    off, effect = float(np.abs(whole - survivors).max()), float(np.abs(renumbered - survivors).max())
    if off > _ALIKE * effect + case.least:
        return (
            f"survivors with their own ids differ from the same tokens of the whole sequence by {off / case.scale:.1e} of the "
            f"largest logit, where renumbering moves them by {effect / case.scale:.1e}"
        )
    return None


def _rows(case: _Case) -> str | None:
    """Whether each row of a batch is placed by its own ids."""
    decoder, call = case.decoder, case.call
    fixed = decoder.inputs.static("rows")
    if fixed == 1 or not decoder.inputs.has_rows:
        return None
    call = Call(fixed or 2, call.tokens, call.past)
    base = _base(call)
    try:
        usual = decoder.logits(call, _Feeding(base))
        for row in range(2):
            ids = base.copy()
            ids[row] += _GAP * np.arange(1, call.tokens + 1)
            by = np.abs(decoder.logits(call, _Feeding(ids)) - usual).max(axis=(1, 2))
            if by[row] <= _NOTHING * np.abs(usual).max():
                return f"gaps in row {row} of a batch do not move its logits"
            if not decoder.rounds_together and np.delete(by, row).max() > _LEAK * by[row]:
                return f"gaps in row {row} of a batch move the logits of other rows"
    except NotRun:
        return None
    return None


def _session(source: Path | str | ir.Model) -> Any:
    """The graph in ONNX Runtime, as it stands: without the fusion that drops ids on the way.

    Raises:
        NotRun: it is not installed, or does not take the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise NotRun("onnxruntime is not installed") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    how = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": ["GroupQueryAttentionFusion"]}
    try:
        if not isinstance(source, ir.Model):
            return onnxruntime.InferenceSession(str(source), options, **how)
        with tempfile.TemporaryDirectory(prefix="gap-export-lint-") as folder:
            path = Path(folder) / "graph.onnx"
            ir.save(source.clone(), path, external_data="weights.bin")
            return onnxruntime.InferenceSession(str(path), options, **how)
    except (
        Exception
    ) as error:  # operators it does not know, weights that are not there: it raises what it likes
        raise NotRun(f"ONNX Runtime does not take the graph: {_plain(error)}") from error


def _plain(error: Exception) -> str:
    """What ONNX Runtime said, without its codes."""
    return re.sub(r"^(\[ONNXRuntimeError\] : \d+ : )?([A-Z_]+ : )?", "", first_line(error)).strip()
